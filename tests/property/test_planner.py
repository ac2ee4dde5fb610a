"""What must hold of every plan, whatever fleet, demand and budget."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, Planner, PlannerSettings, Snapshot, Verdict, v0
from nitsum.planner.slow import SlowPlane
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.topology import Gpu, Node

PROFILE = load_shipped("tiny-llama.slot")
TIERS = (Tier("interactive", 2000, 50, weight=4, default=True), Tier("agents", 10_000, 200), Tier("batch"))


PLANNERS: dict[str, Planner] = {"v0": v0.plan, "slow plane": SlowPlane()}
plan: Planner = v0.plan


@pytest.fixture(autouse=True, scope="module", params=sorted(PLANNERS))
def planner(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs against every planner."""
    global plan
    plan = PLANNERS[request.param]
    yield
    plan = v0.plan


def pool(name: str = "default/chat", budget: int = 4, mode: AdaptationMode = AdaptationMode.ACTIVE) -> Pool:
    return Pool(name, "u-" + name, "tiny-llama", TIERS, budget, mode=mode)


def fleet(*sizes: int) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(Node(f"a{i}", tuple(Gpu(j, f"a{i}-{j}") for j in range(n)), legal_tp={"tiny-llama": (1, 2, 4, 8)}), reported_at=0.0)
        for i, n in enumerate(sizes)
    )


def snapshot(pools: tuple[Pool, ...], nodes: tuple[NodeView, ...], now: float = 0.0, **rates: float) -> Snapshot:
    demand = tuple(
        TierDemand(p.name, t, r, r / 10, prompt_tokens_mean=60, output_tokens_mean=64, observed_at=now)
        for p in pools
        for t, r in rates.items()
    )
    names = [p.name for p in pools]
    return Snapshot(pools, nodes, demand, dict.fromkeys(names, PROFILE), dict.fromkeys(names, PROFILE))


def applied(nodes: tuple[NodeView, ...], p: Plan) -> tuple[NodeView, ...]:
    return tuple(replace(n, residency=w.residency, layout=w.layout) for n in nodes if (w := p.node(n.node.agent_id)))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    budgets=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    steps=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=4),
)
def test_budgets_and_gpus_hold_through_every_change(sizes: list[int], budgets: list[int], steps: list[tuple[float, float]]) -> None:
    pools = tuple(pool(f"default/p{i}", b) for i, b in enumerate(budgets))
    nodes = fleet(*sizes)
    for i, (interactive, agents) in enumerate(steps):
        p = plan(snapshot(pools, nodes, now=100.0 * i, interactive=interactive, agents=agents), 100.0 * i)
        for q in pools:
            assert sum(g.tp_size for n in p.nodes for g in n.layout.groups if g.pool == q.name) <= q.budget_gpus
        for n in p.nodes:  # Layout itself refuses two groups on one GPU
            assert all(n.residency.engine(g.engine_id) for g in n.layout.groups)
        nodes = applied(nodes, p)


@settings(max_examples=30, deadline=None)
@given(interactive=st.floats(0, 4), agents=st.floats(0, 4))
def test_constant_demand_settles(interactive: float, agents: float) -> None:
    nodes = fleet(4)
    ids = []
    for i in range(4):
        now = 100.0 * i
        p = plan(snapshot((pool(),), nodes, now=now, interactive=interactive, agents=agents), now)
        ids.append(p.nodes[0].layout)
        nodes = applied(nodes, p)
    assert ids[1] == ids[2] == ids[3]


@settings(deadline=None)
@given(st.permutations(range(3)))
def test_input_order_does_not_matter(order: list[int]) -> None:
    nodes = fleet(2, 4, 3)
    pools = (pool("default/a", 3), pool("default/b", 4))
    s = snapshot(pools, nodes, interactive=1.0, agents=2.0)
    shuffled = replace(s, nodes=tuple(nodes[i] for i in order), pools=pools[::-1], demand=s.demand[::-1])
    assert plan(s, 0.0) == plan(shuffled, 0.0)


def test_the_mix_decides_tp_and_the_reasons_say_why() -> None:
    nodes = fleet(2)
    loose = plan(snapshot((pool(budget=2),), nodes, interactive=0.0, agents=3.0), 0.0)
    assert [g.tp_size for g in loose.nodes[0].layout.groups] == [1, 1]
    strict = plan(snapshot((pool(budget=2),), applied(nodes, loose), now=100, interactive=0.3, agents=0.05), 100.0)
    assert [g.tp_size for g in strict.nodes[0].layout.groups] == [2]
    assert re.search("2xTP1 -> 1 ?x ?TP2", strict.pools[0].reasons[-1])
    assert strict.pools[0].verdict is Verdict.CHANGE
    assert strict.pools[0].rejected


def test_less_goodput_for_a_tiers_target_is_explained() -> None:
    nodes = applied(fleet(2), v0.plan(snapshot((pool(budget=2),), fleet(2), agents=9.0), 0.0))
    why = v0.plan(snapshot((pool(budget=2),), nodes, now=100, interactive=0.3, agents=1.0), 100.0).pools[0].reasons[-1]
    assert "interactive would meet 0% of its requests now, 100% then" in why
    assert "targets come before goodput" in why


def test_frozen_advisory_stale_and_flipping_keep_what_runs() -> None:
    nodes = applied(fleet(2), plan(snapshot((pool(budget=2),), fleet(2), agents=3.0), 0.0))
    wanted = {"interactive": 0.3, "agents": 0.05}
    for mode in (AdaptationMode.FROZEN, AdaptationMode.ADVISORY):
        kept = plan(snapshot((pool(budget=2, mode=mode),), nodes, **wanted), 0.0)
        assert [g.tp_size for g in kept.nodes[0].layout.groups] == [1, 1]
        assert "would change 2xTP1" in kept.pools[0].reasons[-1]
    s = snapshot((pool(budget=2),), nodes, **wanted)
    assert "no fresh demand" in plan(s, 1000.0).pools[0].reasons[-1]
    assert "a flip is running" in plan(replace(s, nodes=tuple(replace(n, flipping=True) for n in nodes)), 0.0).pools[0].reasons[-1]
    cooling = replace(s, nodes=tuple(replace(n, last_flip_at=-1.0) for n in nodes), settings=PlannerSettings(cooldown_s=5))
    assert "cooling down" in plan(cooling, 0.0).pools[0].reasons[-1]


def test_gpus_that_a_lost_node_may_hold_count_against_the_budget() -> None:
    s = replace(snapshot((pool(budget=2),), fleet(2), agents=1.0), holds={"default/chat": ("lost-0",)})
    assert sum(g.tp_size for g in plan(s, 0.0).nodes[0].layout.groups) == 1


def wide(step: int, tp: int = 1, count: int = 2, **fields: object) -> tuple[Pool, tuple[NodeView, ...]]:
    """A pool of `count` groups of one TP that runs on one node of `step` GPUs."""
    p = replace(pool(budget=step), allowed_tp=(tp,))
    nodes = applied(fleet(step), plan(snapshot((p,), fleet(step), agents=1.0), 0.0))
    assert [g.tp_size for g in nodes[0].layout.groups] == [tp] * count
    return replace(p, **fields), nodes  # type: ignore[arg-type]


def tps(p: Plan, node: int = 0) -> list[int]:
    return [g.tp_size for g in p.nodes[node].layout.groups]


def test_a_new_tier_is_served_at_once_and_a_removed_one_is_forgotten() -> None:
    for mode in AdaptationMode:
        p, nodes = wide(2, tiers=(Tier("interactive", 2000, 50), Tier("rare", 2000, 50, weight=0.01), Tier("night")), mode=mode)
        kept = plan(snapshot((p,), nodes, interactive=50.0), 0.0)
        assert {s.tier for g in kept.nodes[0].layout.groups for s in g.shares} == {"interactive", "rare", "night"}
        assert [g.group_id for g in kept.nodes[0].layout.groups] == [g.group_id for g in nodes[0].layout.groups], "no flip"


def test_another_checkpoint_or_model_is_another_engine() -> None:
    for mode in AdaptationMode:
        p, nodes = wide(2, mode=mode, checkpoint="c0ffee")
        changed = plan(snapshot((p,), nodes, agents=1.0), 0.0)
        assert all(g.engine_id.endswith("-c0ffee") for g in changed.nodes[0].layout.groups)
        assert all(e.engine_id.endswith("-c0ffee") for e in changed.nodes[0].residency.engines), "the old ones go"
        assert "nothing that runs fits" in changed.pools[0].reasons[-1]
        again = plan(snapshot((p,), applied(nodes, changed), agents=1.0), 0.0)
        assert again.nodes[0].layout == changed.nodes[0].layout


def test_a_tp_that_is_not_allowed_any_more_ends_in_every_mode() -> None:
    for mode in AdaptationMode:
        p, nodes = wide(2, mode=mode, allowed_tp=(2,))
        assert tps(plan(snapshot((p,), nodes, agents=50.0), 0.0)) == [2]


def test_a_smaller_budget_takes_groups_away_and_leaves_the_rest_as_they_are() -> None:
    for mode in AdaptationMode:
        p, nodes = wide(4, count=4, mode=mode, budget_gpus=2, allowed_tp=(1, 2))
        kept = plan(snapshot((p,), nodes, agents=50.0), 1000.0)
        assert tps(kept) == [1, 1]
        assert {g.group_id for g in kept.nodes[0].layout.groups} <= {g.group_id for g in nodes[0].layout.groups}


def test_frozen_fills_what_comes_back_and_changes_nothing_else() -> None:
    p, nodes = wide(2, mode=AdaptationMode.FROZEN, budget_gpus=4, allowed_tp=(1, 2, 4))
    grown = fleet(4)[0]
    back = replace(nodes[0], node=grown.node)
    filled = plan(snapshot((p,), (back,), interactive=0.3, agents=0.05), 0.0)
    assert set(nodes[0].layout.gpu_uuids) < set(filled.nodes[0].layout.gpu_uuids)
    assert tps(filled) == [1, 1, 1, 1]


def test_a_gpu_that_no_group_can_use_is_no_reason_to_change() -> None:
    p = replace(pool(budget=5), allowed_tp=(2, 4))
    nodes = applied(fleet(5), plan(snapshot((p,), fleet(5), agents=9.0), 0.0))
    for rates in ({"interactive": 0.3, "agents": 0.05}, {"agents": 9.0}, {"interactive": 9.0}):
        frozen = replace(p, mode=AdaptationMode.FROZEN)
        assert plan(snapshot((frozen,), nodes, **rates), 0.0).nodes[0].layout.gpu_uuids == nodes[0].layout.gpu_uuids
        assert tps(plan(snapshot((frozen,), nodes, **rates), 0.0)) == [g.tp_size for g in nodes[0].layout.groups]
        assert "no fresh demand" in plan(snapshot((p,), nodes, **rates), 1000.0).pools[0].reasons[-1]


def test_moving_to_other_nodes_never_exceeds_the_budget() -> None:
    nodes = tuple(replace(n, node=replace(n.node, labels=(("zone", z),))) for n, z in zip(fleet(2, 2), "ab", strict=True))
    p = replace(pool(budget=2), node_selector=(("zone", "a"),))
    nodes = applied(nodes, plan(snapshot((p,), nodes, agents=1.0), 0.0))
    moved = replace(p, node_selector=(("zone", "b"),))
    first = plan(snapshot((moved,), nodes, agents=1.0), 0.0)
    assert [len(n.layout.gpu_uuids) for n in first.nodes] == [0, 0], "what is on the way out still counts"
    second = plan(snapshot((moved,), applied(nodes, first), agents=1.0), 0.0)
    assert [len(n.layout.gpu_uuids) for n in second.nodes] == [0, 2]
    nowhere = replace(p, node_selector=(("zone", "c"),))
    assert [len(n.layout.gpu_uuids) for n in plan(snapshot((nowhere,), nodes, agents=1.0), 0.0).nodes] == [2, 0], "what runs stays"


def test_a_large_pool_of_many_tiers_is_planned_in_a_fraction_of_a_second() -> None:
    tiers = tuple(Tier(f"t{i}", 500 * (i + 1), 20 * (i + 1), weight=8 - i) for i in range(8))
    nodes = fleet(*[8] * 32)
    s = snapshot((replace(pool(budget=256), tiers=tiers),), nodes, **{t.name: 16.0 for t in tiers})
    started = time.process_time()
    p = plan(s, 0.0)
    assert time.process_time() - started < 5, "tens of seconds where every k of every split is packed"
    assert sum(g.tp_size for n in p.nodes for g in n.layout.groups) == 256
