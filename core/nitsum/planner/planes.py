"""Both planes as one planner: the fast one each second, the slow one when what it decided by has changed, or its interval is over.

What the slow plane decides by: pools, nodes, groups, what may not change now, and demand that has moved by more than it is uncertain. As
long as the layout that it wanted does not run, it is asked again. The fast plane labels the groups that run; it starts and ends nothing.
"""

from dataclasses import replace

from nitsum.demand import TierDemand
from nitsum.planner.capacity import Capacity, mark, near, version
from nitsum.planner.fast import FastPlane
from nitsum.planner.question import ask, stale
from nitsum.planner.remedy import remedies
from nitsum.planner.slow import SlowPlane
from nitsum.planner.types import Plan, PoolPlan, Snapshot

INTERVAL_S = 5.0
"""Longest time between two answers of the slow plane."""
MOVED = 0.2
"""Relative change of a rate that it is asked for at once, if it is more than two standard deviations."""
REMEDY_S = 30.0
"""What would help is worked out anew this often while the same tiers lack it."""

Standing = tuple[object, ...]


def standing(snapshot: Snapshot, now: float) -> Standing:
    """What the slow plane decides by, besides demand; equal where nothing but demand has changed."""
    settings = snapshot.settings
    nodes = tuple(
        (
            n.node,
            n.schedulable,
            n.leaving,
            n.flipping,
            n.last_flip_at is not None and now - n.last_flip_at < settings.cooldown_s,
            tuple(sorted((g.pool, g.engine_id, g.gpu_uuids, g.role) for g in n.layout.groups)),
        )
        for n in sorted(snapshot.nodes, key=lambda n: n.node.agent_id)
    )
    pools = tuple(sorted(snapshot.pools, key=lambda p: p.name))
    times = tuple(version(snapshot.step_times[p.name]) for p in pools)
    asleep = tuple(stale(p.name, snapshot, now) for p in pools)
    return pools, nodes, times, asleep, settings, tuple(sorted(snapshot.holds.items()))


def moved(before: TierDemand, now: TierDemand) -> bool:
    change = abs(now.rate - before.rate)
    return change > max(MOVED * before.rate, 2 * max(before.rate_stddev, now.rate_stddev)) or not near(mark(before), mark(now))


class Planes:
    """Implements `Planner`. Remembers its last answers: equal snapshots in equal order give equal plans."""

    def __init__(self, interval_s: float = INTERVAL_S, governed: bool = True) -> None:
        """`governed`: engines size their prefill steps by TPOT."""
        self.capacity = Capacity(governed)
        self.interval_s = interval_s
        self._slow, self._fast = SlowPlane(capacity=self.capacity), FastPlane(self.capacity)
        self._last: Plan | None = None
        self._at = 0.0
        self._stood: Standing = ()
        self._demand: dict[tuple[str, str], TierDemand] = {}
        self._remedies: dict[str, tuple[frozenset[str], float, tuple[str, ...]]] = {}

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        stood = standing(snapshot, now)
        if self._due(stood, snapshot, now):
            self._last, self._at, self._stood = self._slow(snapshot, now), now, stood
            self._demand = {(d.pool, d.tier): d for d in snapshot.demand}
            found = self._last
        else:
            assert self._last is not None
            found = _merged(self._fast(snapshot, now), self._last, {n.node.agent_id for n in snapshot.nodes if n.schedulable})
        return replace(found, pools=tuple(self._helped(p, snapshot, now) for p in found.pools))

    def _due(self, stood: Standing, snapshot: Snapshot, now: float) -> bool:
        if self._last is None or stood != self._stood or not 0 <= now - self._at < self.interval_s:
            return True
        if any((d.pool, d.tier) not in self._demand or moved(self._demand[d.pool, d.tier], d) for d in snapshot.demand):
            return True
        wanted = {n.agent_id: {(g.pool, g.engine_id, g.role) for g in n.layout.groups} for n in self._last.nodes}
        return any(
            wanted.get(n.node.agent_id) != {(g.pool, g.engine_id, g.role) for g in n.layout.groups} for n in snapshot.nodes if n.schedulable
        )

    def _helped(self, plan: PoolPlan, snapshot: Snapshot, now: float) -> PoolPlan:
        """With what would make its infeasible tiers feasible."""
        lacking = frozenset(t.tier for t in plan.tiers if not t.feasible)
        if not lacking:
            return plan
        tiers, at, said = self._remedies.get(plan.pool, (frozenset(), 0.0, ()))
        if tiers != lacking or not 0 <= now - at < REMEDY_S:
            pool = next(p for p in snapshot.pools if p.name == plan.pool)
            tried = 0 if plan.held or plan.would_change else plan.gpus  # another layout of the same may do
            said = remedies(ask(pool, snapshot), snapshot, self.capacity, set(lacking), tried)
            self._remedies = {p: r for p, r in self._remedies.items() if any(p == q.name for q in snapshot.pools)}
            self._remedies[plan.pool] = lacking, now, said
        return replace(plan, remedies=said)


def _merged(fast: Plan, slow: Plan, schedulable: set[str]) -> Plan:
    """Labels and limits of the fast plan; of the slow one why the layout is as it is, and which engines stay warm: one that has failed
    and is being started again is not reported, but still wanted."""
    warm = {n.agent_id: n.residency for n in slow.nodes if n.agent_id in schedulable}
    nodes = tuple(replace(n, residency=warm.get(n.agent_id, n.residency)) for n in fast.nodes)
    pools = []
    for p in fast.pools:
        if (why := slow.pool(p.pool)) is not None:
            again = replace(p, reasons=why.reasons, rejected=why.rejected, held=why.held, would_change=why.would_change)
            p = again if p.tiers else why
        pools.append(p)
    return replace(fast, nodes=nodes, pools=tuple(pools))
