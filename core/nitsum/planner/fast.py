"""The fast plane: the groups that run stay; which tiers they serve, with what shares and limits, follows demand. Nothing restarts.

What it changes goes to nodes as any plan does: the operator sends limits that have drifted far enough (`drift`), labels at once.
"""

from nitsum.planner.capacity import Capacity
from nitsum.planner.compose import compose
from nitsum.planner.decided import Decided, as_placed
from nitsum.planner.kinds import kinds, standing
from nitsum.planner.question import ask, stale
from nitsum.planner.serve import serve
from nitsum.planner.types import Plan, PoolPlan, Snapshot, Verdict
from nitsum.planner.words import goodput, outlook, profile, told

NEW_MAX = 1
"""Capacities computed anew in one call: lengths drift slowly, and the rest can wait for the next second."""


class FastPlane:
    """Implements `Planner`. Shares `capacity` with a slow plane where there is one."""

    def __init__(self, capacity: Capacity | None = None) -> None:
        self._capacity = capacity or Capacity()

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        decided = []
        self._capacity.left = NEW_MAX
        for pool in sorted(snapshot.pools, key=lambda p: p.name):
            q = ask(pool, snapshot)
            if q.blocked or not q.running:
                plan = PoolPlan(pool.name, q.gpus, 0.0, (), (q.blocked or "nothing runs",), verdict=Verdict.BLOCKED)
                decided.append(Decided(q, tuple(as_placed(q, snapshot.nodes)), None, plan, True))
                continue
            placed = as_placed(q)
            found = kinds(q, snapshot, self._capacity, standing(placed))
            serving = serve(q, found, placed, snapshot.settings.gain_min)
            changed = {p.key: p.tiers for p in placed} != {p.key: p.tiers for p in serving.placed}
            why = f"{told(placed)} stays{': which tiers its groups serve follows demand' if changed else ''}"
            plan = PoolPlan(
                pool.name,
                q.gpus,
                goodput(q, serving.asked, serving.answer),
                outlook(q, found, serving),
                (profile(q, snapshot), why),
                (),
                Verdict.KEEP,
            )
            # Demand that nobody reports any more is no reason to change anything.
            asleep = stale(pool.name, snapshot, now)
            decided.append(Decided(q, tuple(placed) if asleep else serving.placed, serving, plan, asleep))
        self._capacity.left = None
        return compose(decided, snapshot, self._capacity, resident=False)
