"""What must hold of the fast plane, and of plans made from profiles that are wrong."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.layout import FlipMode
from nitsum.perf.profile import Profile, load_shipped
from nitsum.planner import NodeView, Plan, Snapshot
from nitsum.planner.capacity import Capacity
from nitsum.planner.decided import as_placed
from nitsum.planner.fast import FastPlane
from nitsum.planner.kinds import kinds
from nitsum.planner.question import ask
from nitsum.planner.serve import serve
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = (Tier("chat", 500, 20, weight=4, default=True), Tier("agents", 1000, 40, weight=2), Tier("long", 5000, 80, 0.9), Tier("batch"))


def pool(budget: int, tiers: tuple[Tier, ...] = TIERS) -> Pool:
    return Pool("default/chat", "u", "llama", tiers, budget)


def fleet(nodes: int, gpus: int = 8) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(Node(f"a{i:03}", tuple(Gpu(j, f"a{i}-{j}") for j in range(gpus)), legal_tp={"llama": (1, 2, 4, 8)})) for i in range(nodes)
    )


def snapshot(p: Pool, nodes: tuple[NodeView, ...], rates: dict[str, float], profile: Profile = H100, prompt: float = 1000) -> Snapshot:
    demand = tuple(TierDemand(p.name, t, r, 0.0, 1.0, prompt, 1.0, 200, 0.8, observed_at=0.0) for t, r in rates.items())
    return Snapshot((p,), nodes, demand, {p.name: profile}, {p.name: profile})


def applied(nodes: tuple[NodeView, ...], p: Plan) -> tuple[NodeView, ...]:
    return tuple(replace(n, residency=w.residency, layout=w.layout) for n in nodes if (w := p.node(n.node.agent_id)))


def tiers_of(p: Plan) -> set[str]:
    return {s.tier for n in p.nodes for g in n.layout.groups for s in g.shares if s.share > 0}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 80), st.floats(0, 80), st.floats(0, 5)), min_size=2, max_size=4))
def test_the_fast_plane_restarts_nothing(steps: list[tuple[float, float, float]]) -> None:
    p, fast = pool(8), FastPlane()
    nodes = applied(fleet(1), SlowPlane()(snapshot(p, fleet(1), {"chat": 20.0, "agents": 20.0}), 0.0))
    engines = [(g.group_id, g.engine_id, g.gpu_uuids) for g in nodes[0].layout.groups]
    for chat, agents, long in steps:
        plan = fast(snapshot(p, nodes, {"chat": chat, "agents": agents, "long": long}), 0.0)
        assert [(g.group_id, g.engine_id, g.gpu_uuids) for g in plan.nodes[0].layout.groups] == engines
        assert plan.nodes[0].residency == nodes[0].residency
        assert {s.tier for g in plan.nodes[0].layout.groups for s in g.shares} == {t.name for t in TIERS}
        for _ in range(30):  # it looks at a few capacities anew in each second
            nodes = applied(nodes, plan)
            plan = fast(snapshot(p, nodes, {"chat": chat, "agents": agents, "long": long}), 0.0)
        nodes = applied(nodes, plan)
        again = fast(snapshot(p, nodes, {"chat": chat, "agents": agents, "long": long}), 0.0)
        assert again.nodes[0].layout == nodes[0].layout, "labels tremble under constant demand"


def test_groups_follow_demand() -> None:
    p = replace(pool(8), allowed_tp=(1,))
    nodes = applied(fleet(1), SlowPlane()(snapshot(p, fleet(1), {"chat": 40.0, "agents": 5.0}), 0.0))
    count = lambda plan, tier: sum(s.tier == tier and s.share > 0 for n in plan.nodes for g in n.layout.groups for s in g.shares)  # noqa: E731
    more_chat = FastPlane()(snapshot(p, nodes, {"chat": 60.0, "agents": 20.0}), 0.0)
    more_agents = FastPlane()(snapshot(p, nodes, {"chat": 10.0, "agents": 180.0}), 0.0)
    assert count(more_chat, "chat") > count(more_agents, "chat")
    assert count(more_agents, "agents") > count(more_chat, "agents")


def test_a_looser_tier_borrows_only_where_the_strict_one_keeps_its_slo() -> None:
    p = replace(pool(8, (replace(TIERS[0], weight=16), *TIERS[1:])), allowed_tp=(1,))
    nodes = applied(fleet(1), SlowPlane()(snapshot(p, fleet(1), {"chat": 20.0, "agents": 60.0}), 0.0))
    s = snapshot(p, nodes, {"chat": 20.0, "agents": 170.0})
    plan = FastPlane()(s, 0.0)
    found = {k.tiers: k for k in kinds(ask(p, s), s, Capacity()) if k.tp_size == 1}
    for g in plan.nodes[0].layout.groups:
        served = [t.tier for t in g.shares if t.share > 0]
        if "chat" in served:
            assert found["chat", "agents"].rate("agents") > 0
            assert g.capacity.max_running <= max(b for k in found.values() if "chat" in k.tiers for b in k.batches)
    outlook = {t.tier: t for t in plan.pools[0].tiers}
    assert outlook["chat"].feasible, "others were served at its cost"


def test_a_fast_plan_costs_less_than_a_slow_one() -> None:
    """By far; `bench/planner.py` measures how much."""
    tiers = tuple(Tier(f"t{i}", 300 * (i + 1), 12.0 * (i + 1), weight=8 - i) for i in range(8))
    p, fast, slow = pool(128, tiers), FastPlane(), SlowPlane()
    nodes = applied(fleet(16), slow(snapshot(p, fleet(16), {t.name: 30.0 for t in tiers}), 0.0))
    took: dict[str, list[float]] = {"fast": [], "slow": []}
    for i in range(12):
        s = snapshot(p, nodes, {t.name: 25.0 + (7 * i + 11 * j) % 13 for j, t in enumerate(tiers)}, prompt=1000 + 2 * i)
        for name, plan in (("fast", fast), ("slow", slow)):
            started = time.process_time()
            plan(s, 0.0)
            took[name].append(time.process_time() - started)
    assert sorted(took["fast"])[6] < sorted(took["slow"])[6]


class Wrong:
    """A profile that is off by a factor in one phase or both."""

    def __init__(self, prefill: float, decode: float) -> None:
        self.name, self.origin, self.tp_sizes = f"wrong-{prefill}-{decode}", H100.origin, H100.tp_sizes
        self._prefill, self._decode = prefill, decode

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        return self._prefill * H100.prefill_ms(tp_size, chunk, ctx)

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return self._decode * H100.decode_ms(tp_size, batch, ctx)

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        return max(self._prefill, self._decode) * H100.mixed_ms(tp_size, chunk, batch, ctx)

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return H100.kv_capacity_tokens(tp_size, resident_tp)

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        return H100.pause_ms(resident_tokens, mode, from_tp, to_tp)


def worth_in_truth(p: Pool, nodes: tuple[NodeView, ...], plan: Plan, rates: dict[str, float]) -> float:
    """Score of a plan's widths with the best labels that the true profile gives them."""
    s = snapshot(p, applied(nodes, plan), rates)
    q = ask(p, s)
    return serve(q, kinds(q, s, Capacity()), as_placed(q), 0.0).answer.score


@pytest.mark.parametrize(("prefill", "decode"), [(1.5, 1.5), (1 / 1.5, 1 / 1.5), (1.5, 1 / 1.5), (1 / 1.5, 1.5)])
@pytest.mark.parametrize(
    "rates", [{"chat": 20.0, "agents": 20.0}, {"chat": 60.0, "agents": 10.0}, {"chat": 5.0, "agents": 120.0, "long": 3.0}]
)
def test_a_wrong_profile_degrades_gracefully(prefill: float, decode: float, rates: dict[str, float]) -> None:
    p, nodes = pool(8), fleet(1)
    right = worth_in_truth(p, nodes, SlowPlane()(snapshot(p, nodes, rates), 0.0), rates)
    wrong = Wrong(prefill, decode)
    misled = SlowPlane()(snapshot(p, nodes, rates, wrong), 0.0)  # type: ignore[arg-type]
    assert worth_in_truth(p, nodes, misled, rates) >= 0.7 * right
