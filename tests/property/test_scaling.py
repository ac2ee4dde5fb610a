"""More GPUs never make a plan worse, and demand and fleet scale together: on a profile of real size, governed as engines are."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.attainment import MARGIN
from nitsum.demand import TierDemand
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, PlannerSettings, PoolPlan, Snapshot
from nitsum.planner.planes import Planes
from nitsum.planner.problem import Want
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.sim import hardware

PROFILE = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = (Tier("chat", 500, 12, weight=2, default=True), Tier("agents", 2000, 30), Tier("batch", 20_000, 100))
LENGTHS = {"chat": (800, 1.0, 200, 0.8), "agents": (3000, 1.0, 250, 1.0), "batch": (1000, 1.0, 300, 1.0)}
LOST = 0.01
"""Which several layouts reach nearly: the search ends within a gap, and labels are found greedily."""
RATES = st.tuples(st.floats(2, 60), st.floats(2, 40), st.floats(2, 50))
plan = SlowPlane(governed=True)


def taken(rates: tuple[float, ...], gpus: int, nodes: int, quantile: float = 0.9, stddev: float = 0.1) -> Snapshot:
    pool = Pool("default/llama", "u", PROFILE.model, TIERS, gpus)
    views = tuple(NodeView(n) for n in hardware.fleet(f"{nodes}x8:h100_sxm", PROFILE.model, PROFILE.tp_sizes))
    demand = tuple(
        TierDemand(
            pool.name,
            t.name,
            rate,
            rate * stddev,
            cv=1.5,
            prompt_tokens_mean=prompt,
            prompt_tokens_cv=prompt_cv,
            output_tokens_mean=output,
            output_tokens_cv=output_cv,
        )
        for t, rate in zip(TIERS, rates, strict=True)
        for prompt, prompt_cv, output, output_cv in [LENGTHS[t.name]]
    )
    costs = {pool.name: PROFILE}
    return Snapshot((pool,), views, demand, {pool.name: PROFILE}, costs, PlannerSettings(headroom_quantile=quantile))  # type: ignore[arg-type]


def worth(p: PoolPlan, rates: Sequence[float]) -> float:
    """What the objective says of it. Where GPUs are short, that decides, and not how many requests are served."""
    of = zip(p.tiers, TIERS, rates, strict=True)
    return sum(Want("p", t.tier, t.rate, tier.target, tier.weight, sure=MARGIN * r).earned(min(t.safe_rate, t.rate)) for t, tier, r in of)


def feasible(p: PoolPlan) -> bool:
    return all(t.feasible for t in p.tiers)


@settings(max_examples=15, deadline=None)
@given(rates=RATES, scale=st.floats(0.3, 1.3))
def test_more_gpus_never_make_a_plan_worse(rates: tuple[float, ...], scale: float) -> None:
    before: PoolPlan | None = None
    scaled = tuple(r * scale for r in rates)
    for gpus in range(1, 13):
        (now,) = plan(taken(scaled, gpus, 2), 0.0).pools
        assert now.expected_goodput <= sum(scaled) * (1 + 1e-9), "more than comes"
        if before is not None:
            assert worth(now, scaled) >= worth(before, scaled) * (1 - LOST), f"{gpus} GPUs"
            assert now.expected_goodput >= before.expected_goodput * (1 - LOST) or not feasible(before), f"{gpus} GPUs"
            assert feasible(now) or not feasible(before), f"{gpus} GPUs"
        before = now


@settings(max_examples=15, deadline=None)
@given(rates=RATES, scale=st.floats(0.3, 1.3), k=st.sampled_from([2, 3, 4]))
def test_without_headroom_the_plan_scales_with_demand_and_fleet(rates: tuple[float, ...], scale: float, k: int) -> None:
    """More groups share arrivals better, so k times as much is the least."""
    (one,) = plan(taken(tuple(r * scale for r in rates), 8, 1, 0.5, 0.0), 0.0).pools
    (many,) = plan(taken(tuple(r * scale * k for r in rates), 8 * k, k, 0.5, 0.0), 0.0).pools
    assert many.expected_goodput >= k * one.expected_goodput * (1 - LOST) or not feasible(one)
    assert worth(many, [r * scale * k for r in rates]) >= k * worth(one, [r * scale for r in rates]) * (1 - LOST)
    assert feasible(many) or not feasible(one)


@pytest.mark.parametrize(
    ("rates", "gpus", "stddev"),
    [((31.6, 18.2, 48.6), 12, 0.1), ((34.0, 11.3, 30.3), 7, 0.1), ((9.4, 35.8, 37.5), 8, 0.0), ((46.6, 19.5, 19.6), 11, 0.1)],
)
def test_labels_are_not_narrowed_below_what_a_tier_is_promised(rates: tuple[float, ...], gpus: int, stddev: float) -> None:
    """Each was feasible with one GPU less, or at a quarter of the size."""
    k = 4 if stddev == 0 else 1
    quantile = 0.5 if stddev == 0 else 0.9
    (p,) = plan(taken(tuple(r * k for r in rates), gpus * k, -(-gpus * k // 8), quantile, stddev), 0.0).pools
    assert feasible(p), p.tiers


def test_what_would_help_is_more_than_there_is_and_helps() -> None:
    planes, rates = Planes(), (60.0, 30.0, 30.0)
    (p,) = planes(taken(rates, 4, 1), 0.0).pools
    (said,) = p.remedies
    assert not feasible(p)
    gpus = int(said.split(" GPUs in all")[0].split()[-1])
    assert gpus > 4
    (helped,) = planes(taken(rates, gpus, 4), 100.0).pools
    assert feasible(helped), said


def test_a_first_layout_says_what_it_was_chosen_over() -> None:
    (p,) = plan(taken((60.0, 12.0, 10.0), 8, 1), 0.0).pools
    others = [text.split(":")[0] for text in p.rejected]
    assert {"8xTP1", "2xTP4", "1xTP8"} <= set(others)
    assert p.reasons[-1].removeprefix("first layout: ") not in others
    assert all("expected goodput" in text and "less by target and weight" in text for text in p.rejected)
    assert "agents 0." in next(text for text in p.rejected if text.startswith("1xTP8")), "which tier lacks"


@settings(max_examples=15, deadline=None)
@given(rates=RATES, scale=st.floats(0.5, 1.6))
def test_a_first_layout_stays_under_the_demand_that_it_was_made_for(rates: tuple[float, ...], scale: float) -> None:
    """Also where GPUs are short: what was chosen once laid out must not lose to what was rejected."""
    s, widths = taken(tuple(r * scale for r in rates), 8, 1), []
    for now in (0.0, 100.0, 200.0):
        found = plan(replace(s, demand=tuple(replace(d, observed_at=now) for d in s.demand)), now)
        widths.append(sorted(g.tp_size for n in found.nodes for g in n.layout.groups))
        laid = {n.agent_id: n for n in found.nodes}
        views = [replace(v, residency=laid[v.node.agent_id].residency, layout=laid[v.node.agent_id].layout) for v in s.nodes]
        s = replace(s, nodes=tuple(views))
    assert widths[0] == widths[1] == widths[2]
