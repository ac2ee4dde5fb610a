"""What must hold of every plan, whatever fleet, demand and budget."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, PlannerSettings, Snapshot, Verdict
from nitsum.planner.v0 import plan
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.topology import Gpu, Node

PROFILE = load_shipped("tiny-llama.slot")
TIERS = (Tier("interactive", 2000, 50, weight=4, default=True), Tier("agents", 10_000, 200), Tier("batch"))


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
    assert "2xTP1 -> 1 x TP2" in strict.pools[0].reasons[-1]
    assert strict.pools[0].verdict is Verdict.CHANGE
    assert strict.pools[0].rejected


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
