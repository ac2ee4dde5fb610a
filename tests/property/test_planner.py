"""What must hold of every plan, whatever fleet, demand and budget."""

import re
import time
from dataclasses import replace
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.attainment import MARGIN
from nitsum.demand import TierDemand
from nitsum.layout import Layout
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, PlannerSettings, Snapshot, Verdict, exact, greedy
from nitsum.planner.answer import Answer, value
from nitsum.planner.laid import NEAR
from nitsum.planner.problem import Class, Kind, Problem, Want
from nitsum.planner.slow import SlowPlane
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.topology import Gpu, Node

PROFILE = load_shipped("tiny-llama.slot")
TIERS = (Tier("interactive", 2000, 50, weight=4, default=True), Tier("agents", 10_000, 200), Tier("batch"))
plan = SlowPlane()


def pool(
    name: str = "default/chat", budget: int = 4, mode: AdaptationMode = AdaptationMode.ACTIVE, tiers: tuple[Tier, ...] = TIERS
) -> Pool:
    return Pool(name, "u-" + name, "tiny-llama", tiers, budget, mode=mode)


def fleet(*sizes: int, tps: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(Node(f"a{i}", tuple(Gpu(j, f"a{i}-{j}") for j in range(n)), legal_tp={"tiny-llama": tps})) for i, n in enumerate(sizes)
    )


def snapshot(
    pools: tuple[Pool, ...],
    nodes: tuple[NodeView, ...],
    now: float = 0.0,
    stddev: float = 0.1,
    knobs: PlannerSettings | None = None,
    **rates: float,
) -> Snapshot:
    demand = tuple(
        TierDemand(p.name, t, r, r * stddev, prompt_tokens_mean=60, output_tokens_mean=64, observed_at=now)
        for p in pools
        for t, r in rates.items()
    )
    names = [p.name for p in pools]
    return Snapshot(pools, nodes, demand, dict.fromkeys(names, PROFILE), dict.fromkeys(names, PROFILE), knobs or PlannerSettings())


def applied(nodes: tuple[NodeView, ...], p: Plan) -> tuple[NodeView, ...]:
    return tuple(replace(n, residency=w.residency, layout=w.layout) for n in nodes if (w := p.node(n.node.agent_id)))


def worth(p: Plan, headroom: float = 1 + 0.1 * NormalDist().inv_cdf(0.9)) -> float:
    """What the objective says of the first pool, capacity for surges left out. `headroom`: planned over expected rates."""
    weights = {t.name: (t.target, t.weight) for t in TIERS}
    wants = [(t, Want("p", t.tier, t.rate, *weights[t.tier], sure=MARGIN * t.rate / headroom)) for t in p.pools[0].tiers]
    return sum(w.earned(min(t.safe_rate, t.rate)) for t, w in wants)


def widths(p: Plan) -> list[int]:
    return sorted(g.tp_size for n in p.nodes for g in n.layout.groups)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    budgets=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=4),
)
def test_budgets_and_gpus_hold_through_every_change(sizes: list[int], budgets: list[int], steps: list[tuple[float, float]]) -> None:
    pools = tuple(pool(f"default/p{i}", b) for i, b in enumerate(budgets))
    nodes = fleet(*sizes)
    for i, (interactive, agents) in enumerate(steps):
        for part in range(3):  # what moves between nodes under a full budget ends on one before it comes on the other
            now = 300.0 * i + 100.0 * part
            p = plan(snapshot(pools, nodes, now=now, interactive=interactive, agents=agents), now)
            for q in pools:
                held = {n.node.agent_id: sum(g.tp_size for g in n.layout.groups if g.pool == q.name) for n in nodes}
                wanted = {n.agent_id: sum(g.tp_size for g in n.layout.groups if g.pool == q.name) for n in p.nodes}
                assert sum(max(held[a], wanted[a]) for a in held) <= q.budget_gpus, "above the budget while nodes change one by one"
            for n in p.nodes:  # Layout itself refuses two groups on one GPU
                assert all(n.residency.engine(g.engine_id) for g in n.layout.groups)
            nodes = applied(nodes, p)
        used = sum(g.tp_size for n in p.nodes for g in n.layout.groups)
        assert used == min(sum(sizes), sum(budgets)), "GPUs within the budget stand idle"


def test_what_gathers_on_one_node_under_a_full_budget_serves_on_meanwhile() -> None:
    """Two groups of TP 1 on two nodes become one of TP 2: the budget lets it wake only after one of them has gone."""
    spread = applied(fleet(2, 2), plan(snapshot((pool(budget=4),), fleet(2, 2), agents=3.0), 0.0))
    assert [[g.tp_size for g in n.layout.groups] for n in spread] == [[1, 1], [1, 1]]
    nodes = tuple(replace(n, layout=Layout(n.layout.groups[:1])) for n in spread)
    seen = []
    for i in range(3):
        now = 100.0 * (i + 1)
        p = plan(snapshot((pool(budget=2),), nodes, now=now, interactive=0.3, agents=0.05), now)
        for n, before in zip(p.nodes, nodes, strict=True):
            if n.layout.groups:
                assert set(n.residency.engines) >= {e for e in before.residency.engines if e.tp_size == 2}, "else it starts cold"
        nodes = applied(nodes, p)
        seen.append(sorted(widths(p)))
    assert seen == [[1], [2], [2]]


@settings(max_examples=15, deadline=None)
@given(interactive=st.floats(0, 4), agents=st.floats(0, 4), sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_constant_demand_settles(interactive: float, agents: float, sizes: list[int]) -> None:
    nodes = fleet(*sizes)
    layouts = []
    for i in range(4):
        now = 100.0 * i
        p = plan(snapshot((pool(budget=sum(sizes)),), nodes, now=now, interactive=interactive, agents=agents), now)
        layouts.append([n.layout.gpu_uuids for n in p.nodes] + [widths(p)])
        nodes = applied(nodes, p)
    assert layouts[1] == layouts[2] == layouts[3]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)))
def test_input_order_does_not_matter(order: list[int]) -> None:
    nodes = fleet(2, 4, 3)
    pools = (pool("default/a", 3), pool("default/b", 4))
    s = snapshot(pools, nodes, interactive=1.0, agents=2.0)
    shuffled = replace(s, nodes=tuple(nodes[i] for i in order), pools=pools[::-1], demand=s.demand[::-1])
    assert SlowPlane()(s, 0.0) == SlowPlane()(shuffled, 0.0)


@settings(max_examples=20, deadline=None)
@given(interactive=st.floats(0.1, 3), agents=st.floats(0.1, 3), k=st.integers(2, 5))
def test_demand_and_fleet_scale_together(interactive: float, agents: float, k: int) -> None:
    knobs = PlannerSettings(headroom_quantile=0.5)
    one = plan(snapshot((pool(budget=8),), fleet(8), knobs=knobs, interactive=interactive, agents=agents), 0.0)
    many = plan(snapshot((pool(budget=8 * k),), fleet(*[8] * k), knobs=knobs, interactive=interactive * k, agents=agents * k), 0.0)
    assert worth(many, 1.0) >= k * worth(one, 1.0) * (1 - NEAR)


@settings(max_examples=20, deadline=None)
@given(interactive=st.floats(0, 6), agents=st.floats(0, 6), size=st.integers(1, 7))
def test_more_gpus_never_lower_expected_goodput(interactive: float, agents: float, size: int) -> None:
    fewer = plan(snapshot((pool(budget=size),), fleet(size), interactive=interactive, agents=agents), 0.0)
    more = plan(snapshot((pool(budget=size + 1),), fleet(size + 1), interactive=interactive, agents=agents), 0.0)
    assert worth(more) >= worth(fewer) * (1 - 1e-3)


def test_the_mix_decides_tp_and_the_reasons_say_why() -> None:
    nodes = fleet(2)
    loose = plan(snapshot((pool(budget=2),), nodes, interactive=0.0, agents=3.0), 0.0)
    assert widths(loose) == [1, 1]
    strict = plan(snapshot((pool(budget=2),), applied(nodes, loose), now=100, interactive=0.3, agents=0.05), 100.0)
    assert widths(strict) == [2]
    assert "2xTP1 -> 1xTP2" in strict.pools[0].reasons[-1]
    assert strict.pools[0].verdict is Verdict.CHANGE
    assert strict.pools[0].rejected
    costly = plan(snapshot((pool(budget=2),), applied(nodes, loose), now=100, interactive=0.6, agents=0.5), 100.0)
    for reason in (strict.pools[0].reasons[-1], costly.pools[0].reasons[-1]):
        found = re.search(r"expected goodput (\S+) -> (\S+) requests/s(, but (\S+) -> (\S+) by target and weight)?", reason)
        assert found is not None, reason
        gains = found[3] is None
        assert float(found[2]) > float(found[1]) if gains else float(found[5]) > float(found[4]), f"no reason to change: {reason}"


def test_frozen_advisory_stale_and_flipping_keep_what_runs() -> None:
    nodes = applied(fleet(2), plan(snapshot((pool(budget=2),), fleet(2), agents=3.0), 0.0))
    wanted = {"interactive": 0.3, "agents": 0.05}
    for mode in (AdaptationMode.FROZEN, AdaptationMode.ADVISORY):
        kept = plan(snapshot((pool(budget=2, mode=mode),), nodes, **wanted), 0.0)
        assert widths(kept) == [1, 1]
        assert "would change 2xTP1" in kept.pools[0].reasons[-1]
    s = snapshot((pool(budget=2),), nodes, **wanted)
    assert "no fresh demand" in plan(s, 1000.0).pools[0].reasons[-1]
    assert "a flip is running" in plan(replace(s, nodes=tuple(replace(n, flipping=True) for n in nodes)), 0.0).pools[0].reasons[-1]
    cooling = replace(s, nodes=tuple(replace(n, last_flip_at=-1.0) for n in nodes), settings=PlannerSettings(cooldown_s=5))
    assert "cooling down" in plan(cooling, 0.0).pools[0].reasons[-1]


def test_gpus_that_a_lost_node_may_hold_count_against_the_budget() -> None:
    s = replace(snapshot((pool(budget=2),), fleet(2), agents=1.0), holds={"default/chat": ("lost-0",)})
    assert widths(plan(s, 0.0)) == [1]


def test_an_infeasible_slo_is_named() -> None:
    tiers = (Tier("impossible", 2000, 1), Tier("agents", 10_000, 200))
    p = plan(snapshot((pool(tiers=tiers),), fleet(4), impossible=1.0, agents=1.0), 0.0)
    outlook = {t.tier: t for t in p.pools[0].tiers}
    assert not outlook["impossible"].feasible
    assert "TPOT" in outlook["impossible"].binding
    assert outlook["agents"].feasible


def test_degrees_that_do_not_divide_each_other_still_fill_the_node() -> None:
    p = plan(snapshot((pool(budget=5),), fleet(5, tps=(1, 2)), interactive=1.0, agents=1.0), 0.0)
    assert sum(widths(p)) == 5


def test_a_solver_that_fails_is_named_and_greedy_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("numbers")

    monkeypatch.setattr(exact, "solve", fail)
    p = plan(snapshot((pool(),), fleet(4), interactive=1.0), 0.0)
    assert any("greedy decided" in r and "numbers" in r for r in p.pools[0].reasons)
    assert sum(widths(p)) == 4


def test_the_better_of_exact_and_greedy_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    s = snapshot((pool(budget=15),), fleet(5, 7, 3), interactive=1.7, agents=2.9)
    alone, found = SlowPlane(use_exact=False)(s, 0.0), SlowPlane()(s, 0.0)
    assert worth(found) > 1.05 * worth(alone), "exact finds more here"
    assert not any("greedy" in r for r in found.pools[0].reasons)
    search = exact.solve

    def ended_early(problem: Problem, start: Answer | None = None, **given: object) -> Answer | None:
        """One group of all, where it should search; it still tells what flows through given groups."""
        if given.get("fixed") is not None or start is None:
            return search(problem, **given)  # type: ignore[arg-type]
        return value(problem, dict(list(start.counts.items())[:1]), "exact")

    monkeypatch.setattr(exact, "solve", ended_early)
    weak = SlowPlane()(s, 0.0)
    assert any(r == "greedy found more than the bounded exact search" for r in weak.pools[0].reasons)
    assert [n.layout.gpu_uuids for n in weak.nodes] == [n.layout.gpu_uuids for n in alone.nodes]
    assert widths(weak) == widths(alone)
    assert worth(weak) >= worth(alone) * (1 - 1e-9)


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


problems = st.builds(
    lambda wants, rates, nodes, budget: Problem(
        tuple(Want("p", f"t{i}", rate, target, weight) for i, (rate, target, weight) in enumerate(wants)),
        tuple(
            Kind("p", tp, tiers, tuple(rates[i % len(rates)] * tp**0.8 for i, _ in enumerate(tiers)))
            for tp in (1, 2, 4)
            for tiers in [(f"t{i}",) for i in range(len(wants))] + [tuple(f"t{i}" for i in range(len(wants)))]
        ),
        (Class(nodes, 4, frozenset({"p"}), {1: 4, 2: 2, 4: 1}),),
        {"p": budget},
    ),
    wants=st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.5, 1), st.floats(0.1, 8)), min_size=1, max_size=4),
    rates=st.lists(st.floats(0, 5), min_size=1, max_size=3),
    nodes=st.integers(1, 20),
    budget=st.integers(1, 60),
)


@settings(max_examples=25, deadline=None)
@given(problems)
def test_exact_and_greedy_obey_the_limits_and_greedy_comes_near(asked: Problem) -> None:
    found, near = exact.solve(asked), greedy.solve(asked)
    assert asked.legal(near.counts)
    if found is None:
        return
    assert asked.legal(found.counts)
    at_best = exact.solve(asked, fixed=near.counts)
    assert at_best is not None
    assert at_best.score >= near.score - 1e-6, "greedy counts what no flow can give"
    assert at_best.score <= found.score * (1 + 1e-3) + 1e-6, "greedy beats the optimum: the two do not share an objective"
    assert at_best.score >= 0.8 * found.score - 1e-6


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from([0, 1, 2, exact.NODES_MAX]))
def test_a_search_never_ends_below_the_answer_that_it_begins_from(asked: Problem, nodes_max: int) -> None:
    start = greedy.solve(asked)
    start = exact.solve(asked, fixed=start.counts, by="greedy") or start
    found = exact.solve(asked, nodes_max, start=start)
    assert found is None or found.score >= start.score - 1e-9 * abs(start.score)
