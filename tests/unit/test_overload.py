"""What a planner does where not all demand can be served, and what it keeps resident."""

from dataclasses import replace

import pytest

from nitsum.demand import TierDemand
from nitsum.layout import Group, Layout, TierShare
from nitsum.perf.memory import worth_residing
from nitsum.perf.profile import Profile, load_shipped
from nitsum.planner import NodeView, PlannerSettings, Snapshot, Verdict, limits
from nitsum.planner.answer import value
from nitsum.planner.capacity import Capacity
from nitsum.planner.fast import FastPlane
from nitsum.planner.problem import Class, Kind, Problem, Want
from nitsum.planner.question import ask
from nitsum.planner.slow import SlowPlane
from nitsum.planner.steady import gain_asked
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
NODE = Node("a", tuple(Gpu(i, f"g{i}") for i in range(8)), legal_tp={"m": (1, 2, 4, 8)})
STRICT, LONG = Tier("strict", 500.0, 10.0, default=True), Tier("long", 10_000.0, 40.0)


def snapshot(tiers: tuple[Tier, ...], demand: tuple[TierDemand, ...], view: NodeView, profile: Profile = H100) -> Snapshot:
    return Snapshot((Pool("default/p", "u", "m", tiers, 8),), (view,), demand, {"default/p": profile}, {"default/p": profile})


def test_a_wide_group_does_what_it_is_better_at_by_most() -> None:
    """TP4 is better than TP1 at both tiers, but for bulk four TP1 on its GPUs would be far better."""
    bulk, both = Kind("p", 1, ("bulk",), (22.7,)), Kind("p", 4, ("fast", "bulk"), (25.8, 32.6))
    wants = (Want("p", "fast", 33.6, 0.95, 1.0), Want("p", "bulk", 100.7, 0.95, 1.0))
    asked = Problem(wants, (bulk, both), (Class(4, 1, frozenset("p"), {1: 1}), Class(1, 4, frozenset("p"), {4: 1})), {"p": 8})
    answer = value(asked, {(0, 0): 4, (1, 1): 1}, "test")
    assert answer.flows[1, "fast"] > 20
    assert answer.served["p", "bulk"] > 90


def running(*widths: int) -> NodeView:
    """Groups that serve both tiers."""
    groups, first = [], 0
    for tp in widths:
        name = f"default.p-tp{tp}-{first}"
        uuids = tuple(f"g{i}" for i in range(first, first + tp))
        groups.append(Group(name, name, "default/p", "m", tp, uuids, shares=(TierShare("strict", 0.9), TierShare("long", 0.1))))
        first += tp
    return NodeView(NODE, layout=Layout(tuple(groups)))


def test_what_comes_of_a_tier_that_gets_hardly_any_capacity_goes_to_one_group_and_is_capped_there() -> None:
    demand = (
        TierDemand("default/p", "strict", 99.0, 2.5, 1.0, 1240, 1.0, 205, 0.8, observed_at=0.0),
        TierDemand("default/p", "long", 11.0, 0.8, 1.2, 11_600, 1.3, 330, 0.7, observed_at=0.0),
    )
    plan = FastPlane(Capacity(governed=True))(snapshot((STRICT, LONG), demand, running(1, 1, 1, 1, 1, 1, 2)), 0.0)
    shares = [{s.tier: s for s in g.shares} for g in plan.nodes[0].layout.groups]
    assert all(of["strict"].share > 0.9 for of in shares)
    taken_in = [of["long"] for of in shares if of.get("long", TierShare("long", 0.0)).share > 0]
    assert len(taken_in) == 1
    assert taken_in[0].max_running == 1, "eleven requests/s of 12,000 tokens would break what the group holds"
    outlook = {t.tier: t for t in plan.pools[0].tiers}
    assert not outlook["long"].feasible


@pytest.mark.parametrize(
    ("name", "kept"),
    [("qwen3-32b.h100_sxm", (2, 4, 8)), ("llama-3.1-8b-instruct.h100_sxm", (1, 2, 4, 8)), ("qwen3-32b.h200_sxm", (1, 2, 4, 8))],
)
def test_a_tp_whose_weights_take_the_others_kv_is_not_resident(name: str, kept: tuple[int, ...]) -> None:
    profile = load_shipped(name)
    assert worth_residing(profile, (1, 2, 4, 8)) == kept
    assert worth_residing(profile, (1,)) == (1,), "the only one is kept"
    demand = (TierDemand("default/p", "strict", 5.0, 1.0, 1.0, 500, 0.8, 100, 0.8, observed_at=0.0),)
    plan = SlowPlane(capacity=Capacity(governed=True))(snapshot((replace(STRICT, tpot_ms=40.0),), demand, NodeView(NODE), profile), 0.0)
    assert {e.tp_size for e in plan.nodes[0].residency.engines} == set(kept)
    assert ("not kept resident" in " ".join(plan.pools[0].reasons)) == (kept != (1, 2, 4, 8))


def test_what_is_asked_of_a_change_falls_with_the_time_that_a_layout_has_stood() -> None:
    settings = PlannerSettings(dwell_s=30.0, gain_min=0.05)

    def asked(flipped: float | None, now: float) -> float:
        s = replace(snapshot((STRICT,), (), replace(running(8), last_flip_at=flipped)), settings=settings)
        return gain_asked(ask(s.pools[0], s), s, now)

    assert asked(100.0, 100.0) == pytest.approx(0.05)
    assert 0.02 < asked(100.0, 130.0) < 0.05
    assert asked(100.0, 160.0) == asked(None, 0.0) == pytest.approx(0.02)


def test_what_an_active_pool_would_not_do_an_advisory_one_does_not_say_that_it_would() -> None:
    """Idle GPUs are no change: 8xTP1 would become the fewest groups that the little demand there is needs."""
    demand = tuple(TierDemand("default/p", t, 0.0, observed_at=0.0) for t in ("strict", "long"))
    slow, view = SlowPlane(governed=True), NodeView(NODE)
    for _ in range(2):
        (node,) = slow(snapshot((STRICT, LONG), demand, view), 0.0).nodes
        view = replace(view, layout=node.layout, residency=node.residency)
    for mode in AdaptationMode:
        s = snapshot((STRICT, LONG), demand, view)
        plan = slow(replace(s, pools=(replace(s.pools[0], mode=mode),)), 0.0).pools[0]
        assert (plan.verdict, plan.would_change, plan.rejected) == (Verdict.KEEP, False, ()), (mode, plan.reasons)
    many = snapshot((STRICT,), (TierDemand("default/p", "strict", 400.0, 1.0, 1.0, 500, 0.8, 100, 0.8, observed_at=0.0),), running(8))
    plan = slow(replace(many, pools=(replace(many.pools[0], mode=AdaptationMode.ADVISORY),)), 0.0).pools[0]
    assert (plan.verdict, plan.would_change) == (Verdict.KEEP, True), plan.reasons


def test_a_reason_says_how_long_the_plan_counts_on_its_layout() -> None:
    """As long as the last one has stood; and no dwell at all is no division by zero."""
    demand = (TierDemand("default/p", "strict", 400.0, 1.0, 1.0, 500, 0.8, 100, 0.8, observed_at=200.0),)
    for dwell_s, flipped, said in (
        (30.0, 120.0, "expected to last 80 s"),
        (30.0, 199.0 - 5, "30 s"),
        (0.0, 120.0, "expected to last 10 s"),
    ):
        s = snapshot((STRICT,), demand, replace(running(8), last_flip_at=flipped))
        plan = SlowPlane(governed=True)(replace(s, settings=replace(s.settings, dwell_s=dwell_s)), 200.0).pools[0]
        assert plan.verdict is Verdict.CHANGE, plan.reasons
        assert said in plan.reasons[-1]


@pytest.mark.parametrize(
    ("rate", "ttft_ms", "running", "queue"),
    [(40.0, 500.0, 30, 9), (0.9, 5000.0, 2, 16), (0.1, 500.0, 2, 16), (2.0, 500.0, 8, 8), (5.0, 500.0, 14, 3), (5.0, None, 4, 24)],
)
def test_a_slow_group_does_not_refuse_the_third_in_its_queue(rate: float, ttft_ms: float | None, running: int, queue: int) -> None:
    """A queue of 2 and one of 16 were a hundredth of a request/s apart."""
    assert limits.queue(rate, ttft_ms, running) == queue
