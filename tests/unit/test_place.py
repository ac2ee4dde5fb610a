"""Which GPUs change hands: those whose streams have the least KV, and the more KV there is, the more a change must gain."""

from dataclasses import replace
from itertools import permutations

import pytest

from nitsum.demand import TierDemand
from nitsum.layout import FlipMode, Group, Layout, TierShare
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, PlannerSettings, Snapshot
from nitsum.planner.joint import flip_loss
from nitsum.planner.place import Placed, Running, Slot, place
from nitsum.planner.question import ask
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.residency import Residency, ResidentEngine
from nitsum.topology import Gpu, Node

PROFILE = load_shipped("tiny-llama.slot")
TIERS = (Tier("interactive", 2000, 50, weight=4, default=True), Tier("agents", 10_000, 200))
NAMES = tuple(t.name for t in TIERS)
TPS = (1, 2, 4)


def node(agent_id: str, *tokens: int, tp: int = 1, pool: str = "default/chat", gpus: int = 0) -> NodeView:
    """With a group of `tp` for each of `tokens`, which its streams hold, side by side; engines of every TP are warm on all its GPUs."""
    devices = tuple(Gpu(i, f"{agent_id}-{i}") for i in range(gpus or tp * len(tokens)))
    of = Node(agent_id, devices, legal_tp={"tiny-llama": TPS})
    name = lambda size, block: f"{pool.replace('/', '.')}-tp{size}-{block[0].index}"  # noqa: E731
    warm = tuple(ResidentEngine(name(size, b), "tiny-llama", size, tuple(g.uuid for g in b)) for size in TPS for b in of.blocks(size))
    groups = tuple(
        Group(name(tp, b), name(tp, b), pool, "tiny-llama", tp, tuple(g.uuid for g in b), shares=tuple(TierShare(t, 0.5) for t in NAMES))
        for b, _ in zip(of.blocks(tp), tokens, strict=False)
    )
    held = {g.group_id: n for g, n in zip(groups, tokens, strict=True)}
    return NodeView(of, Residency(warm), Layout(groups), held)


def running(*nodes: NodeView) -> Running:
    return {(g.pool, n.node.agent_id, g.gpu_uuids, None): NAMES for n in nodes for g in n.layout.groups}


def snapshot(budget: int, *nodes: NodeView, **rates: float) -> Snapshot:
    pool = Pool("default/chat", "u", "tiny-llama", TIERS, budget)
    demand = tuple(TierDemand(pool.name, t, r, 0.1 * r, prompt_tokens_mean=60, output_tokens_mean=64) for t, r in rates.items())
    return Snapshot((pool,), nodes, demand, {pool.name: PROFILE}, {pool.name: PROFILE}, PlannerSettings())


def uuids(placed: list[Placed] | None, tp: int) -> set[tuple[str, ...]]:
    assert placed is not None
    return {tuple(g.uuid for g in p.gpus) for p in placed if len(p.gpus) == tp}


@pytest.mark.parametrize("tokens", list(permutations((10, 20, 40, 80))))
def test_the_block_with_the_least_kv_gives_way(tokens: tuple[int, ...]) -> None:
    n = node("a", *tokens)
    wide, narrow = Slot("default/chat", 2, NAMES, 1), Slot("default/chat", 1, NAMES, 2)
    found = place([wide, narrow], [n], running(n))
    least = (0, 1) if tokens[0] + tokens[1] < tokens[2] + tokens[3] else (2, 3)
    assert uuids(found, 2) == {tuple(f"a-{i}" for i in least)}
    assert uuids(found, 1) == {(f"a-{i}",) for i in {0, 1, 2, 3} - set(least)}, "the others go on where they are"


def test_the_node_with_the_least_kv_gives_way() -> None:
    for a, b in ((7000, 10), (10, 7000)):
        nodes = [node("a", a, tp=4), node("b", b, tp=4)]
        found = place([Slot("default/chat", 4, NAMES, 1), Slot("default/chat", 2, NAMES, 2)], nodes, running(*nodes))
        assert {u[0][0] for u in uuids(found, 4)} == {"a" if a > b else "b"}
        assert {u[0][0] for u in uuids(found, 2)} == {"b" if a > b else "a"}


def test_an_idle_block_is_taken_before_any_that_has_kv() -> None:
    n = node("a", 1, 1, gpus=4)
    found = place([Slot("default/chat", 2, NAMES, 1), Slot("default/chat", 1, NAMES, 2)], [n], running(n))
    assert uuids(found, 2) == {("a-2", "a-3")}


def test_of_groups_as_wide_those_with_the_most_kv_go_on() -> None:
    n = node("a", 0, 9000, 1, 2)
    assert uuids(place([Slot("default/chat", 1, NAMES, 2)], [n], running(n)), 1) == {("a-1",), ("a-3",)}


def test_a_block_that_would_push_out_what_is_wanted_is_not_taken_for_its_little_kv() -> None:
    """TP 1 on GPUs 0 and 1 is wanted, what runs on the others is not."""
    n, other = node("a", 0, 0, gpus=4), node("a", 500, tp=2)
    late = replace(other.layout.groups[0], group_id="x", engine_id="x", gpu_uuids=("a-2", "a-3"))
    n = replace(n, layout=Layout((*n.layout.groups, late)), resident_tokens={"x": 500})
    wanted = [Slot("default/chat", 2, NAMES, 1), Slot("default/chat", 1, NAMES, 2)]
    stays = running(n)
    assert uuids(place(wanted, [n], {key: t for key, t in stays.items() if len(key[2]) == 1}), 2) == {("a-2", "a-3")}


@pytest.mark.parametrize("tokens", list(permutations((500, 10, 20, 100))))
def test_over_the_budget_the_groups_with_the_most_kv_go_on(tokens: tuple[int, ...]) -> None:
    n = node("a", *tokens)
    s = snapshot(2, n, interactive=0.1, agents=0.1)
    kept = {f"a-{i}" for i, held in enumerate(tokens) if held in (500, 100)}
    assert {key[2][0] for key in ask(s.pools[0], s).running} == kept
    stale = SlowPlane()(s, 1000.0)
    assert stale.nodes[0].layout.gpu_uuids == kept, "nothing but repair"


def test_a_flip_loses_more_the_more_kv_its_groups_hold() -> None:
    lost = []
    for tokens in (0, 100, 10_000):
        s = snapshot(2, node("a", tokens, tokens), interactive=0.3, agents=0.05)
        lost.append(flip_loss(ask(s.pools[0], s), s, score=6.0, dwell_s=60.0)["default/chat", 2])
    per_gpu_s = 6.0 / 2 / 60.0
    assert lost == pytest.approx([per_gpu_s * PROFILE.pause_ms(n, FlipMode.ABORT, 1, 2) / 1e3 for n in (0, 100, 10_000)])
    assert lost == sorted(set(lost))


def test_a_change_that_pays_for_empty_groups_does_not_for_full_ones() -> None:
    def widths(tokens: int) -> list[int]:
        s = replace(snapshot(2, node("a", tokens, tokens), interactive=0.6, agents=0.64), settings=PlannerSettings(dwell_s=5))
        return [g.tp_size for g in SlowPlane()(s, 0.0).nodes[0].layout.groups]

    assert widths(0) == [2]
    assert widths(8000) == [1, 1], "0.6 s of 10"
