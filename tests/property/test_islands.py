"""GPUs of a node that no fast link joins: a TP group, or a split block, never lies on two of its islands."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.layout import Role
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, Snapshot
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
CHAT, BULK = Tier("chat", 1000, 7, default=True), Tier("bulk", 10_000, 100)
WIDE = Tier("wide", 1000, 2.9)
slow = SlowPlane(governed=True)


def node(*islands: int) -> NodeView:
    """`islands`: how many GPUs each has, side by side."""
    of = [i for i, n in enumerate(islands) for _ in range(n)]
    gpus = tuple(Gpu(j, f"g{j}", island=island) for j, island in enumerate(of))
    return NodeView(Node("a", gpus, legal_tp={"llama": (1, 2, 4, 8)}))


def planned(view: NodeView, *tiers: Tier, **rates: float) -> Plan:
    pool = Pool("default/p", "u", "llama", tiers, len(view.node.gpus))
    demand = tuple(TierDemand(pool.name, t, r, 0.0, 1.0, 2500, 0.9, 212, 0.8) for t, r in rates.items())
    return slow(Snapshot((pool,), (view,), demand, {pool.name: H100}, {pool.name: H100}), 0.0)


def whole(plan: Plan, view: NodeView) -> bool:
    """No group, and no pair of groups that hands over between them, but what some island holds; every GPU is used."""
    island = {g.uuid: g.island for g in view.node.gpus}
    groups = plan.nodes[0].layout.groups
    inside = all(len({island[u] for u in g.gpu_uuids}) == 1 for g in groups)
    roles = {(island[g.gpu_uuids[0]], g.role) for g in groups if g.role is not Role.MIXED}
    paired = all({(i, Role.PREFILL), (i, Role.DECODE)} <= roles for i, _ in roles)
    return inside and paired and plan.nodes[0].layout.gpu_uuids == set(island)


def test_two_islands_of_four_hold_no_group_of_eight() -> None:
    joined, apart = node(8), node(4, 4)
    assert [g.tp_size for g in planned(joined, WIDE, wide=8.0).nodes[0].layout.groups] == [8]
    plan = planned(apart, WIDE, wide=8.0)
    assert [g.gpu_uuids for g in plan.nodes[0].layout.groups] == [("g0", "g1", "g2", "g3"), ("g4", "g5", "g6", "g7")]
    assert {g.tp_size for g in plan.nodes[0].layout.groups} == {4}
    assert all(e.tp_size <= 4 for e in plan.nodes[0].residency.engines)


@pytest.mark.parametrize(("islands", "widest"), [((4, 4), [4, 4]), ((2, 6), [2, 2, 4]), ((3, 5), [1, 1, 2, 4]), ((6, 2), [2, 2, 4])])
def test_aligned_groups_as_wide_as_an_island_lets_them(islands: tuple[int, ...], widest: list[int]) -> None:
    """GPUs 0 to 3 hold no group of four where an island ends among them."""
    plan = planned(node(*islands), WIDE, wide=8.0)
    assert sorted(g.tp_size for g in plan.nodes[0].layout.groups) == widest
    assert whole(plan, node(*islands))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.floats(0, 80), st.floats(0, 60))
def test_whatever_is_asked_no_group_and_no_block_lies_on_two(islands: list[int], chat: float, bulk: float) -> None:
    view = node(*islands)
    assert whole(planned(view, CHAT, BULK, chat=chat, bulk=bulk), view)
