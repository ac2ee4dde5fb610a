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
from nitsum.planner.ending import WAIT_MAX_S, ending, life_s, mean_life_s, of_node
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


def test_a_node_has_one_mode_that_of_the_group_that_loses_most() -> None:
    ends, comes = [group("a", (0,)), group("b", (1,))], [group("c", (0, 1))]
    lives, costs = {"default/p": 2.0}, {"default/p": H100}
    much, little = {"a": 300_000, "b": 1000}, {"a": 1000, "b": 1000}
    assert of_node(ends, comes, much, lives, costs) == ending(300_000, 1, 2, 2.0, H100)
    assert of_node(ends, comes, little, lives, costs).mode is FlipMode.ABORT
    assert of_node([], comes, much, lives, costs).lost_ms == 0.0


def flipping(at: set[int], cap: int) -> list[str]:
    """Nodes whose layout a plan changes, of four with 2 x TP1 under demand that wants TP2; `at`: those that flip already."""
    tiers = (Tier("t", 2000, 50, default=True),)
    nodes, pools, demand = [], [], []
    for i in range(4):
        name = f"default/p{i}"
        layout = Layout(tuple(replace(group(f"default.p{i}-tp1-{j}", (j,), name), gpu_uuids=(f"{i}-{j}",)) for j in range(2)))
        node = Node(f"n{i}", tuple(Gpu(j, f"{i}-{j}") for j in range(2)), (("pool", f"{i}"),), legal_tp={"tiny-llama": (1, 2)})
        nodes.append(NodeView(node, layout=layout, reported_at=0.0, flipping=i in at))
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
