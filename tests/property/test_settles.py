"""Constant demand, as gateways report it: both planes together come to rest, and nothing flips from then on."""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist

import pytest

from nitsum.demand_estimate import DemandEstimator, Window
from nitsum.length_sketch import Sketch
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, PlannerSettings, Snapshot
from nitsum.planner.planes import Planes
from nitsum.pool import Pool, Tier
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = (Tier("chat", 500, 20, weight=4, default=True), Tier("agents", 1000, 40, weight=2), Tier("tight", 1000, 7), Tier("batch"))
KNOBS = PlannerSettings()
CHANGE_S = 40
SETTLED_S = CHANGE_S + 100
"""Rates are known after some half lives of 10 s; less and less gain is asked of a change until a layout has stood for twice the dwell."""
END_S = SETTLED_S + 200


def lengths(mean: float, cv: float, n: int) -> tuple[Mapping[int, float], int, float]:
    """The same lognormal lengths in each window: `n` of them, at equal quantiles."""
    sketch, sigma = Sketch(), math.sqrt(math.log1p(cv**2))
    for i in range(n):
        sketch.add(mean * math.exp(sigma * NormalDist().inv_cdf((i + 0.5) / n) - sigma**2 / 2))
    return sketch.buckets, 0, sketch.total


def flips(before: dict[str, int], after: dict[str, int], nodes: int) -> list[int]:
    """Seconds at which an engine is ended. A flip takes no time here, but its node cools down."""
    pool = Pool("default/p", "u", "llama", TIERS, 8 * nodes)
    views = tuple(
        NodeView(Node(f"n{i}", tuple(Gpu(j, f"n{i}-{j}") for j in range(8)), legal_tp={"llama": (1, 2, 4, 8)})) for i in range(nodes)
    )
    estimator, planes, found = DemandEstimator(), Planes(), []
    for second in range(1, END_S + 1):
        now = float(second)
        for tier, n in (before if second <= CHANGE_S else after).items():
            estimator.observe(Window(pool.name, tier, now, 1.0, n, float(n**2), 0, lengths(1500, 0.9, n), lengths(200, 0.8, n)))
        plan = planes(Snapshot((pool,), views, estimator.estimate(now), {pool.name: H100}, {pool.name: H100}, KNOBS), now)
        changed = []
        for v in views:
            wanted = plan.node(v.node.agent_id)
            assert wanted is not None
            ends = {g.engine_id for g in v.layout.groups} - {g.engine_id for g in wanted.layout.groups}
            found += [second] * bool(ends)
            at = now if ends else v.last_flip_at
            changed.append(replace(v, residency=wanted.residency, layout=wanted.layout, last_flip_at=at))
        views = tuple(changed)
    return found


@pytest.mark.parametrize(
    ("before", "after", "nodes"),
    [
        ({"chat": 20, "agents": 20}, {"chat": 20, "agents": 20}, 1),
        ({"chat": 20, "agents": 40, "tight": 40}, {"chat": 60, "agents": 10, "tight": 0}, 1),
        ({"chat": 20, "tight": 3, "batch": 4}, {"chat": 0, "agents": 100, "tight": 3, "batch": 4}, 1),
        ({"tight": 10, "batch": 4}, {"chat": 60, "agents": 100, "tight": 40, "batch": 0}, 2),
        ({"chat": 5, "tight": 40}, {"chat": 300, "agents": 200, "tight": 5}, 1),
    ],
)
def test_after_it_settles_nothing_flips(before: dict[str, int], after: dict[str, int], nodes: int) -> None:
    found = flips(before, after, nodes)
    assert not [at for at in found if at > SETTLED_S], found
    assert before == after or any(at > CHANGE_S for at in found), "nothing that could have gone on"
