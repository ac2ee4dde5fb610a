"""A profile wrong by half either way, in the closed loop: goodput degrades and it is learned away from the engines' own timings."""

import random
from dataclasses import replace

import pytest

from nitsum.perf.correction import Corrected, StepTiming
from nitsum.perf.profile import Profile, load_shipped
from nitsum.planner import Plan, Snapshot
from nitsum.planner.planes import Planes
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.sim import arrivals, hardware, workload
from nitsum.sim.fleet import Fleet
from nitsum.sim.metrics import policy_figures
from nitsum.sim.policies import Policy, governed

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = (Tier("chat", 500, 12, default=True), Tier("agents", 2000, 30))
FAR = 0.05
"""As the operator's: from there on plans are made with a new copy."""


def scaled(factor: float) -> Profile:
    def times(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(ms * factor for ms in row) for row in rows)

    tables = {
        tp: replace(t, decode_ms=times(t.decode_ms), prefill_ms=times((t.prefill_ms,))[0], prefill_cached_ms=times(t.prefill_cached_ms))
        for tp, t in H100.tables.items()
    }
    return replace(H100, tables=tables)


class Operator:
    """Implements `Planner`: plans with what it believes, and hears once a second what the engines' steps took."""

    def __init__(self, believed: Profile, learns: bool) -> None:
        self.fleet: Fleet | None = None
        self.planes, self.learns = Planes(), learns
        self.model = Corrected(believed)
        self.taken, self.version = self.model.fixed(0), 0
        self.random = random.Random(1)

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        for node in self.fleet.nodes.values() if self.fleet is not None and self.learns else ():
            for g in node.groups.values():
                self.hear(g.group.tp_size, len(g.engine.running), g.engine.resident_at(now))
        if self.model.far_from(self.taken, FAR):
            self.version += 1
            self.taken = self.model.fixed(self.version)
        return self.planes(replace(snapshot, step_times={p.name: self.taken for p in snapshot.pools}), now)

    def hear(self, tp: int, batch: int, tokens: int) -> None:
        ctx = tokens // max(batch, 1)
        timings = [StepTiming(tp, 1024, 0, 0, H100.prefill_ms(tp, 1024))]
        if batch:
            timings += [
                StepTiming(tp, 0, batch, ctx, H100.decode_ms(tp, batch, ctx)),
                StepTiming(tp, 512, batch, ctx, H100.mixed_ms(tp, 512, batch, ctx)),
            ]
        for t in timings:
            self.model.observe(replace(t, ms=t.ms * self.random.lognormvariate(0, 0.05)))


def attained(believed: Profile, learns: bool, after_s: float = 20.0) -> float:
    """Attainment of what comes after the first seconds."""
    nodes = hardware.fleet("1x4:h100_sxm", H100.model, H100.tp_sizes)
    lengths = {"arrivals": "poisson", "prompt": {"mean": 1000, "cv": 1}, "output": {"mean": 200, "cv": 0.8}}
    streams = [{"tier": "chat", "synthetic": lengths, "rate": 36}, {"tier": "agents", "synthetic": lengths, "rate": 36}]
    traffic = arrivals.build(workload.parse({"duration": "60s", "streams": streams}), lambda path: (), 1)
    pool = Pool("default/p", "u", H100.model, TIERS, 4, mode=AdaptationMode.ACTIVE)
    operator = Operator(believed, learns)
    policy = Policy("nitsum", pool, H100, H100.tp_sizes, lambda: operator, limits=governed)
    operator.fleet = Fleet(policy, nodes, H100, traffic)
    result = operator.fleet.run()
    if learns:
        assert operator.version > 0
        for tp in {tp for tp, _ in operator.model._lines}:
            assert operator.taken.decode_ms(tp, 16, 1200) == pytest.approx(H100.decode_ms(tp, 16, 1200), rel=0.1), tp
    later = [o for o in result.outcomes if o.arrived >= after_s]
    figures = policy_figures(pool, replace(result, outcomes=tuple(later)), {})
    return float(figures["attainment"])


def test_wrong_profiles_degrade_gracefully_and_are_learned_away() -> None:
    right = attained(H100, False)
    for factor in (1.5, 1 / 1.5):
        wrong, learned = attained(scaled(factor), False), attained(scaled(factor), True)
        assert wrong >= 0.6 * right, factor
        assert learned >= right - 0.03, factor
        assert learned >= wrong + 0.03, factor
