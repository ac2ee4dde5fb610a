"""What must hold of plans with roles: both sides of a hand-over on one node, never one alone, whatever comes and goes."""

from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.layout import FlipMode, Group, Layout, Role, TierShare
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, Snapshot, Verdict
from nitsum.planner.capacity import Capacity
from nitsum.planner.fast import FastPlane
from nitsum.planner.planes import Planes
from nitsum.planner.problem import Kind
from nitsum.planner.question import ask
from nitsum.planner.repair import fill
from nitsum.planner.slow import SlowPlane
from nitsum.planner.split import Split
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
CHAT, BULK = Tier("chat", 1000, 7, default=True), Tier("bulk", 10_000, 100)
capacity = Capacity(governed=True)
slow = SlowPlane(capacity=capacity)


def pool(name: str = "default/chat", budget: int = 8, *tiers: Tier, **fields: object) -> Pool:
    return Pool(name, "u-" + name, "llama", tiers or (CHAT,), budget, **fields)  # type: ignore[arg-type]


def fleet(*sizes: int) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(Node(f"a{i}", tuple(Gpu(j, f"a{i}-{j}") for j in range(n)), legal_tp={"llama": (1, 2, 4, 8)})) for i, n in enumerate(sizes)
    )


def snapshot(pools: tuple[Pool, ...], nodes: tuple[NodeView, ...], now: float = 0.0, cost: object = H100, **rates: float) -> Snapshot:
    demand = tuple(
        TierDemand(p.name, t, r, 0.0, 1.0, 2500, 0.9, 212, 0.8, observed_at=now)
        for p in pools
        for t, r in rates.items()
        if any(tier.name == t for tier in p.tiers)
    )
    costs = {p.name: cost for p in pools}
    return Snapshot(pools, nodes, demand, {p.name: H100 for p in pools}, costs)  # type: ignore[arg-type]


def applied(nodes: tuple[NodeView, ...], p: Plan) -> tuple[NodeView, ...]:
    return tuple(replace(n, residency=w.residency, layout=w.layout) for n in nodes if (w := p.node(n.node.agent_id)))


def roles(p: Plan) -> Counter[tuple[Role, int]]:
    return Counter((g.role, g.tp_size) for n in p.nodes for g in n.layout.groups)


def paired(p: Plan) -> bool:
    """Wherever a pool prefills only, it decodes on the same node, and the other way round."""
    found = {(n.agent_id, g.pool, g.role) for n in p.nodes for g in n.layout.groups if g.role is not Role.MIXED}
    other = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
    return all((a, name, other[role]) in found for a, name, role in found)


def split_pool(budget: int = 8, **fields: object) -> tuple[Pool, tuple[NodeView, ...]]:
    """A pool that runs in roles on one node of eight GPUs."""
    p, nodes = pool("default/chat", budget), fleet(8)
    plan = slow(snapshot((p,), nodes, chat=50.0), 0.0)
    assert {role for role, _ in roles(plan)} == {Role.PREFILL, Role.DECODE}, plan.pools[0].reasons
    return replace(p, **fields), applied(nodes, plan)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([2, 4, 6, 8]), min_size=1, max_size=3),
    budgets=st.lists(st.integers(1, 12), min_size=1, max_size=2),
    steps=st.lists(st.tuples(st.floats(0, 120), st.floats(0, 60), st.booleans()), min_size=1, max_size=4),
)
def test_budgets_gpus_and_pairs_hold_through_every_change(
    sizes: list[int], budgets: list[int], steps: list[tuple[float, float, bool]]
) -> None:
    pools = tuple(pool(f"default/p{i}", b, CHAT, BULK) for i, b in enumerate(budgets))
    nodes = fleet(*sizes)
    for i, (chat, bulk, lost) in enumerate(steps):
        if lost:  # a GPU of the first node is gone
            first = replace(nodes[0].node, gpus=nodes[0].node.gpus[:-1]) if len(nodes[0].node.gpus) > 1 else nodes[0].node
            here = {g.uuid for g in first.gpus}
            nodes = (replace(nodes[0], node=first, layout=_left(nodes[0].layout, here)), *nodes[1:])
        for part in range(2):
            now = 300.0 * i + 100.0 * part
            taken = snapshot(pools, nodes, now, chat=chat, bulk=bulk)
            p = slow(taken, now)
            assert paired(p)
            assert p == slow(taken, now), "equal inputs give equal plans"
            for q in pools:
                held = {n.node.agent_id: sum(g.tp_size for g in n.layout.groups if g.pool == q.name) for n in nodes}
                wanted = {n.agent_id: sum(g.tp_size for g in n.layout.groups if g.pool == q.name) for n in p.nodes}
                assert sum(max(held[a], wanted[a]) for a in held) <= max(q.budget_gpus, sum(held.values()))
            for n, view in zip(p.nodes, sorted(nodes, key=lambda v: v.node.agent_id), strict=True):
                assert all(n.residency.engine(g.engine_id) for g in n.layout.groups)
                blocks = {tuple(g.uuid for g in b) for tp in (1, 2, 4, 8) for b in view.node.blocks(tp)}
                assert all(g.gpu_uuids in blocks for g in n.layout.groups), "a group that is not aligned"
            nodes = applied(nodes, p)
            assert paired(FastPlane(capacity)(snapshot(pools, nodes, now, chat=bulk, bulk=chat), now))


def _left(layout: Layout, here: set[str]) -> Layout:
    return Layout(tuple(g for g in layout.groups if here.issuperset(g.gpu_uuids)))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(8)))
def test_input_order_does_not_matter(order: list[int], groups: list[int]) -> None:
    nodes = fleet(8, 4, 8)
    pools = (pool("default/a", 8), pool("default/b", 8, CHAT, BULK))
    nodes = applied(nodes, slow(snapshot(pools, nodes, chat=50.0, bulk=5.0), 0.0))
    s = snapshot(pools, nodes, 100.0, chat=55.0, bulk=8.0)
    mixed = (replace(n, layout=Layout(tuple(n.layout.groups[i] for i in groups if i < len(n.layout.groups)))) for n in nodes)
    turned = list(mixed)
    shuffled = replace(s, nodes=tuple(turned[i] for i in order), pools=pools[::-1], demand=s.demand[::-1])
    first, again = (SlowPlane(governed=True)(x, 100.0) for x in (s, shuffled))
    assert any(role is not Role.MIXED for role, _ in roles(first))
    assert first == again


def test_roles_are_chosen_where_tpot_is_tight_and_given_up_where_it_is_not() -> None:
    p, nodes = split_pool()
    reasons = slow(snapshot((p,), fleet(8), chat=50.0), 0.0).pools[0].reasons
    assert "prefill + " in reasons[-1]
    assert " decode" in reasons[-1]
    loose = replace(p, tiers=(replace(CHAT, tpot_ms=60.0),))
    plan = slow(snapshot((loose,), nodes, 200.0, chat=60.0), 200.0)
    assert {role for role, _ in roles(plan)} == {Role.MIXED}
    assert plan.pools[0].verdict is Verdict.CHANGE


def test_a_change_of_role_is_a_change_that_restarts_nothing() -> None:
    p = pool("default/chat", 8, replace(CHAT, tpot_ms=6.0), allowed_tp=(2,))
    nodes = applied(fleet(8), SlowPlane(governed=True)(snapshot((p,), fleet(8), chat=1.0), 0.0))
    assert {g.role for g in nodes[0].layout.groups} == {Role.MIXED}
    plan = SlowPlane(governed=True)(snapshot((p,), nodes, 100.0, chat=60.0), 100.0)
    assert plan.pools[0].verdict is Verdict.CHANGE
    assert "4xTP2 -> 2xTP2 prefill + 2xTP2 decode" in plan.pools[0].reasons[-1]
    same = [(g.group_id, g.engine_id, g.gpu_uuids) for g in nodes[0].layout.groups]
    assert [(g.group_id, g.engine_id, g.gpu_uuids) for g in plan.nodes[0].layout.groups] == same
    assert plan.nodes[0].residency == nodes[0].residency
    kept = SlowPlane(governed=True)(snapshot((p,), applied(nodes, plan), 200.0, chat=60.0), 200.0)
    assert (kept.nodes[0].layout, kept.pools[0].verdict) == (plan.nodes[0].layout, Verdict.KEEP)


def test_the_fast_plane_keeps_roles_and_labels_a_block_as_one() -> None:
    p = pool("default/chat", 16, CHAT, BULK)
    nodes = applied(fleet(8, 8), slow(snapshot((p,), fleet(8, 8), chat=80.0, bulk=20.0), 0.0))
    before = {(n.node.agent_id, g.group_id): g.role for n in nodes for g in n.layout.groups}
    assert Role.DECODE in before.values()
    fast = FastPlane(Capacity(governed=True))
    seen = set()
    for chat, bulk in ((10.0, 5.0), (100.0, 5.0), (80.0, 40.0), (0.0, 50.0)):
        for _ in range(30):  # a few capacities are looked at anew in each second
            plan = fast(snapshot((p,), nodes, chat=chat, bulk=bulk), 0.0)
            nodes = applied(nodes, plan)
        assert {(n.agent_id, g.group_id): g.role for n in plan.nodes for g in n.layout.groups} == before
        for n in plan.nodes:
            shares = {g.shares for g in n.layout.groups if g.role is not Role.MIXED}
            assert len(shares) <= 1 or sum(g.role is Role.PREFILL for g in n.layout.groups) > 1, "a block apart"
        prefill, decode = ([g for n in plan.nodes for g in n.layout.groups if g.role is role] for role in (Role.PREFILL, Role.DECODE))
        assert all(g.capacity.prefill_tokens_per_step > 0 for g in decode)
        assert all(g.capacity.prefill_tokens_per_step == 0 and g.capacity.max_running > 0 for g in prefill)
        seen.add(tuple((g.shares, g.capacity) for n in plan.nodes for g in n.layout.groups))
    assert len(seen) > 1, "shares follow demand"


def by_hand(node: NodeView, *groups: tuple[int, int, Role]) -> NodeView:
    """With groups at (first GPU, TP, role), named as the planner names them."""
    uuids = [g.uuid for g in node.node.gpus]
    names = [f"default.chat-tp{tp}-{first}" for first, tp, _ in groups]
    made = (
        Group(name, name, "default/chat", "llama", tp, tuple(uuids[first : first + tp]), role, (TierShare("chat", 1.0),))
        for name, (first, tp, role) in zip(names, groups, strict=True)
    )
    return replace(node, layout=Layout(tuple(made)))


def test_a_block_and_a_group_as_wide_are_labelled_apart() -> None:
    p = pool("default/chat", 8, CHAT, BULK)
    (node,) = fleet(8)
    node = by_hand(node, (0, 2, Role.DECODE), (2, 1, Role.PREFILL), (3, 1, Role.PREFILL), (4, 4, Role.MIXED))
    for chat, bulk in ((0.0, 30.0), (5.0, 5.0), (60.0, 0.0), (30.0, 60.0)):
        plan = FastPlane(Capacity(governed=True))(snapshot((p,), (node,), chat=chat, bulk=bulk), 0.0)
        assert {g.group_id: (g.role, g.tp_size) for g in plan.nodes[0].layout.groups} == {
            g.group_id: (g.role, g.tp_size) for g in node.layout.groups
        }
        served = {s.tier for g in plan.nodes[0].layout.groups for s in g.shares if s.share > 0}
        assert served == {"chat", "bulk"}


def test_where_a_block_comes_in_part_what_is_there_does_both_meanwhile() -> None:
    """Four groups of TP 1 on each of two nodes, and a budget that lets the rest of a block of eight come only after some have gone."""
    p = pool("default/chat", 8, allowed_tp=(1, 4))
    nodes = tuple(by_hand(n, *((i, 1, Role.MIXED) for i in range(4, 8))) for n in fleet(8, 8))
    seen = []
    for step in range(4):
        now = 100.0 * (step + 1)
        plan = SlowPlane(governed=True)(snapshot((p,), nodes, now, chat=60.0), now)
        assert paired(plan)
        assert sum(max(len(n.layout.gpu_uuids), len(w.layout.gpu_uuids)) for n, w in zip(nodes, plan.nodes, strict=True)) <= 8
        nodes = applied(nodes, plan)
        seen.append(roles(plan))
    assert seen[0] != seen[-1]
    assert seen[-1] == Counter({(Role.PREFILL, 1): 4, (Role.DECODE, 4): 1})


def test_what_a_lost_gpu_leaves_of_a_block_does_both_or_ends() -> None:
    for mode in AdaptationMode:
        p, nodes = split_pool(mode=mode)
        for lost in range(8):
            gpus = tuple(g for g in nodes[0].node.gpus if g.index != lost)
            here = {g.uuid for g in gpus}
            left = replace(nodes[0], node=replace(nodes[0].node, gpus=gpus), layout=_left(nodes[0].layout, here))
            for planner in (slow, FastPlane(capacity)):
                plan = planner(snapshot((p,), (left,), chat=50.0), 0.0)
                assert paired(plan), (mode, lost, planner)
                assert plan.nodes[0].layout.groups
                assert {u for g in plan.nodes[0].layout.groups for u in g.gpu_uuids} <= here


def test_idle_gpus_take_the_width_of_mixed_groups_whatever_blocks_are_known() -> None:
    p = pool()
    q = ask(p, snapshot((p,), fleet(8), chat=50.0))
    rates = {1: 1.0, 2: 8.0, 4: 4.0, 8: 2.0}
    mixed = tuple(Kind(p.name, tp, ("chat",), (rate,), ("TPOT",), (8,)) for tp, rate in rates.items())
    block = Kind(p.name, 4, ("chat",), (99.0,), ("TPOT",), (8,), split=Split(2, 1, 1, 2))
    assert {len(x.gpus) for x in fill([q], [], set(), (*mixed, block))} == {2}


def test_a_smaller_budget_breaks_no_block_into_halves() -> None:
    for budget in range(1, 8):
        p, nodes = split_pool(budget_gpus=budget)
        plan = slow(snapshot((p,), nodes, chat=50.0), 0.0)
        assert paired(plan)
        assert 0 < sum(g.tp_size for g in plan.nodes[0].layout.groups) <= budget


def test_frozen_stale_and_blocked_pools_keep_their_roles() -> None:
    p, nodes = split_pool()
    loose = (replace(CHAT, tpot_ms=60.0),)
    for now, q in ((0.0, replace(p, mode=AdaptationMode.FROZEN, tiers=loose)), (1000.0, p)):
        for planner in (slow, FastPlane(capacity)):
            plan = planner(snapshot((q,), nodes, chat=60.0), now)
            assert [g.role for g in plan.nodes[0].layout.groups] == [g.role for g in nodes[0].layout.groups]
    nowhere = replace(p, node_selector=(("zone", "c"),))
    assert [g.role for g in slow(snapshot((nowhere,), nodes, chat=60.0), 0.0).nodes[0].layout.groups] == [
        g.role for g in nodes[0].layout.groups
    ]


@dataclass(frozen=True)
class Pause:
    """Implements FlipCost; of a KV store nothing is known."""

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        return 100.0


def test_without_a_store_that_keeps_kv_nothing_is_handed_over() -> None:
    p, nodes = split_pool()
    assert {role for role, _ in roles(SlowPlane()(snapshot((p,), fleet(8), cost=Pause(), chat=50.0), 0.0))} == {Role.MIXED}
    back = SlowPlane()(snapshot((p,), nodes, 100.0, Pause(), chat=50.0), 100.0)
    assert {role for role, _ in roles(back)} == {Role.MIXED}, "and what is handed over is not any more"


def test_both_planes_together_keep_a_block_calm() -> None:
    p, planes = pool(), Planes()
    nodes = fleet(8)
    layouts = []
    for second in range(40):
        plan = planes(snapshot((p,), nodes, float(second), chat=50.0 + second % 3), float(second))
        nodes = applied(nodes, plan)
        layouts.append([(g.group_id, g.role) for g in nodes[0].layout.groups])
    assert layouts[1:] == [layouts[1]] * 39
    assert {role for _, role in layouts[1]} == {Role.PREFILL, Role.DECODE}
