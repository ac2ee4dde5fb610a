"""Streams of groups that end: aborted, or left to end for a while, whichever loses less of the GPUs' time."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.layout import Capacity, FlipMode, Group, Layout, Role, TierShare
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, PlannerSettings, Snapshot
from nitsum.planner.ending import WAIT_MAX_S, Ends, ending, life_s, mean_life_s, of_node
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.sim.policies.registry import FixedPause
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TINY = load_shipped("tiny-llama.slot")


def lost_ms(tokens: int, wait: float, life: float) -> float:
    fixed, again = H100.pause_ms(0, FlipMode.ABORT, 1, 2), H100.pause_ms(tokens, FlipMode.ABORT, 1, 2)
    left = math.exp(-wait / life)
    return fixed + (wait - life * (1 - left)) * 1e3 + (again - fixed) * left


@given(st.integers(0, 400_000), st.floats(0.1, 60))
def test_what_is_chosen_loses_least_of_all_waits(tokens: int, life: float) -> None:
    found = ending(tokens, 1, 2, life, H100)
    best = min(lost_ms(tokens, w / 10, life) for w in range(int(WAIT_MAX_S * 10) + 1))
    if found.mode is FlipMode.LET_FINISH:
        assert 0 < found.let_finish_s <= WAIT_MAX_S
        assert found.lost_ms <= best * (1 + 1e-6)
    else:
        assert found.lost_ms == pytest.approx(lost_ms(tokens, 0, life))
        assert found.lost_ms - best <= 500 + 1e-6


def test_much_kv_of_short_streams_waits_and_little_or_of_long_ones_does_not() -> None:
    assert ending(300_000, 1, 2, 2.0, H100).mode is FlipMode.LET_FINISH
    assert ending(5_000, 1, 2, 2.0, H100).mode is FlipMode.ABORT
    assert ending(300_000, 1, 2, 600.0, H100).mode is FlipMode.ABORT
    assert ending(300_000, 1, 2, 2.0, FixedPause(30_000)).mode is FlipMode.ABORT, "a restart gains nothing by waiting"


def test_lives_are_of_streams_not_of_requests() -> None:
    short, long = Tier("short", 1000, 10), Tier("long", 1000, 10)
    demand = {
        "short": TierDemand("p", "short", 9.0, output_tokens_mean=100, output_tokens_cv=0.0),
        "long": TierDemand("p", "long", 1.0, output_tokens_mean=900, output_tokens_cv=0.0),
    }
    assert (life_s(short, demand["short"]), life_s(long, demand["long"])) == (0.5, 4.5)
    assert mean_life_s((short, long), demand) == pytest.approx(2.5)  # as many of each run
    assert mean_life_s((), demand) == 0.0


def group(name: str, gpus: tuple[int, ...], pool: str = "default/p") -> Group:
    return Group(name, name, pool, "tiny-llama", len(gpus), tuple(f"g{i}" for i in gpus), Role.MIXED, (TierShare("t", 1.0),), Capacity())


def ends(name: str, gpus: tuple[int, ...], tokens: int, life: float = 2.0, tps: tuple[int, ...] = (1, 2)) -> Ends:
    return Ends(group(name, gpus), tokens, life, H100, tps)


def test_a_node_has_one_mode_that_of_the_group_that_loses_most() -> None:
    comes = [group("c", (0, 1))]
    assert of_node([ends("a", (0,), 300_000), ends("b", (1,), 1000)], comes) == ending(300_000, 1, 2, 2.0, H100)
    assert of_node([ends("a", (0,), 1000), ends("b", (1,), 1000)], comes).mode is FlipMode.ABORT
    assert of_node([], comes).lost_ms == 0.0


def test_what_follows_of_another_pool_or_at_a_tp_that_is_gone_does_not_matter() -> None:
    """The profile of the pool that ends need not know the TP that comes."""
    a = ends("a", (0, 1), 300_000, tps=(2, 4))
    assert of_node([a], [group("c", (0,), "default/other")]) == of_node([a], []) == ending(300_000, 2, 2, 2.0, H100)
    assert of_node([ends("a", (0, 1), 300_000, tps=(4, 8))], []) == ending(300_000, 2, 4, 2.0, H100)
    assert of_node([ends("a", (0, 1), 300_000, tps=())], []).mode is FlipMode.ABORT


def test_a_profile_without_rates_lets_streams_finish_too() -> None:
    assert (
        TINY.pause_ms(5000, FlipMode.LET_FINISH, 1, 2) == TINY.pause_ms(0, FlipMode.ABORT, 1, 2) < TINY.pause_ms(5000, FlipMode.ABORT, 1, 2)
    )


def flipping(at: set[int], cap: int, lost: frozenset[int] = frozenset()) -> list[str]:
    """Nodes whose layout a plan changes, of four with 2 x TP1 under demand that wants TP2; `at`: those that flip already."""
    tiers = (Tier("t", 2000, 50, default=True),)
    nodes, pools, demand = [], [], []
    for i in range(4):
        name = f"default/p{i}"
        layout = Layout(tuple(replace(group(f"default.p{i}-tp1-{j}", (j,), name), gpu_uuids=(f"{i}-{j}",)) for j in range(2)))
        node = Node(f"n{i}", tuple(Gpu(j, f"{i}-{j}") for j in range(2)), (("pool", f"{i}"),), legal_tp={"tiny-llama": (1, 2)})
        nodes.append(NodeView(node, layout=layout, flipping=i in at, schedulable=i not in lost))
        pools.append(Pool(name, f"u{i}", "tiny-llama", tiers, 2, node_selector=(("pool", f"{i}"),)))
        demand.append(TierDemand(name, "t", 0.3, 0.03, prompt_tokens_mean=60, output_tokens_mean=64))
    names = [p.name for p in pools]
    knobs = PlannerSettings(flips_at_once_max=cap)
    s = Snapshot(tuple(pools), tuple(nodes), tuple(demand), dict.fromkeys(names, TINY), dict.fromkeys(names, TINY), knobs)
    found = SlowPlane()(s, 0.0)
    return [n.agent_id for n, was in zip(found.nodes, nodes, strict=True) if [g.tp_size for g in n.layout.groups] != [1, 1]]


def test_flips_that_run_count_against_the_cap() -> None:
    assert flipping(set(), 4) == ["n0", "n1", "n2", "n3"]
    assert flipping(set(), 2) == ["n0", "n1"]
    assert flipping({0, 1}, 2) == []
    assert flipping({0}, 2) == ["n1"]
    assert flipping({0, 1}, 2, lost=frozenset({0, 1})) == ["n2", "n3"], "nobody knows what lost nodes do"


def test_each_group_by_the_streams_that_it_runs() -> None:
    """Of one pool, a group for short streams is let finish where one for long ones would not be, whatever the pool's mean is."""
    tiers = (Tier("chat", 500, 12, default=True), Tier("reason", 5000, 30))
    demand = (
        TierDemand("default/p", "chat", 20, 2, prompt_tokens_mean=1000, output_tokens_mean=150),
        TierDemand("default/p", "reason", 1, 0.1, prompt_tokens_mean=1000, output_tokens_mean=3000),
    )
    pool = Pool("default/p", "u", H100.model, tiers, 8)
    gpus = tuple(Gpu(i, f"g{i}") for i in range(8))
    modes = []
    for tier in ("chat", "reason"):
        old = replace(group("default.p-tp8-0", tuple(range(8))), model=H100.model, shares=(TierShare(tier, 1.0),))
        view = NodeView(Node("n", gpus, legal_tp={H100.model: (1,)}), layout=Layout((old,)), resident_tokens={old.group_id: 1_000_000})
        s = Snapshot((pool,), (view,), demand, {pool.name: H100}, {pool.name: H100})
        modes.append(SlowPlane()(s, 0.0).nodes[0].mode)
    assert modes == [FlipMode.LET_FINISH, FlipMode.ABORT]
