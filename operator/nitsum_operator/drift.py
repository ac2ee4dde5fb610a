"""Whether shares and capacities have moved far enough from what runs to be worth a directive. Pure.

They follow demand by small steps every second; sending each would be noise, sending none would leave groups with the limits of an old mix.
"""

from dataclasses import fields

from nitsum.layout import Capacity, Group, Layout

REFRESH_S = 10.0
"""Least time between two directives that change nothing else."""
CAPACITY_CHANGE = 0.25
"""Relative: a limit within this of what runs stays."""
SHARE_CHANGE = 0.1


def _far(old: float, new: float) -> bool:
    return abs(new - old) > CAPACITY_CHANGE * max(abs(old), 1.0)


def _moved(old: Group, new: Group) -> bool:
    a, b = old.capacity, new.capacity
    if any(_far(getattr(a, f.name), getattr(b, f.name)) for f in fields(Capacity)):
        return True
    before, after = ({s.tier: s for s in g.shares} for g in (old, new))
    if before.keys() != after.keys():
        return True
    return any(abs(after[t].share - s.share) > SHARE_CHANGE or _far(s.max_running, after[t].max_running) for t, s in before.items())


def drifted(runs: Layout, wanted: Layout) -> bool:
    """Of layouts that hold the same groups; a group that only one of them has is a change of another kind and does not count."""
    now = {g.group_id: g for g in runs.groups}
    return any(_moved(now[g.group_id], g) for g in wanted.groups if g.group_id in now)
