"""Why layouts last: when a pool may not change, and how much a change must gain when it may."""

from nitsum.planner.question import PoolQuestion, stale
from nitsum.planner.types import Snapshot

STEADY = 0.4
DWELL_MAX = 10
"""Multiple of the expected dwell: a layout that has stood for longer than that says no more about the next one."""
DWELL_MIN = 1.0
"""Seconds; whatever is set, a pause is weighed against some time."""
STALE = "no fresh demand report: the last safe layout stays"


def _flipped_at(q: PoolQuestion) -> float | None:
    """When a node that the pool runs on last did."""
    mine = {key[1] for key in q.running}
    return max((n.last_flip_at for n in q.nodes if n.node.agent_id in mine and n.last_flip_at is not None), default=None)


def hold(q: PoolQuestion, snapshot: Snapshot, now: float) -> str:
    """Why the pool must keep its layout now; empty: it may change."""
    settings = snapshot.settings
    if not q.running:
        return ""
    if stale(q.pool.name, snapshot, now):
        return STALE
    mine = {key[1] for key in q.running}
    if any(n.flipping for n in q.nodes if n.node.agent_id in mine) or any(d.frozen for d in snapshot.demand if d.pool == q.pool.name):
        return "a flip is running"
    if (at := _flipped_at(q)) is not None and now - at < settings.cooldown_s:
        return f"cooling down for {settings.cooldown_s:g} s after the last flip"
    return ""


def stood(q: PoolQuestion, snapshot: Snapshot, now: float) -> float:
    """Seconds since the pool's last flip; of one that never flipped nothing is known but that it is over."""
    at = _flipped_at(q)
    return now - at if at is not None else 2 * snapshot.settings.dwell_s


def dwell(q: PoolQuestion, snapshot: Snapshot, now: float) -> float:
    """Seconds that the next layout is expected to last: as long as the last one has, within bounds."""
    least = max(snapshot.settings.dwell_s, DWELL_MIN)
    return min(max(stood(q, snapshot, now), least), DWELL_MAX * least)


def gain_asked(q: PoolQuestion, snapshot: Snapshot, now: float) -> float:
    """The least relative gain of a change: `gain_min` at first, STEADY of it where a layout has stood for twice the dwell that is expected
    after a flip, so that what is a little better for long does not stay out of reach."""
    settings = snapshot.settings
    steady = min(stood(q, snapshot, now) / (2 * settings.dwell_s), 1.0) if settings.dwell_s > 0 else 1.0
    return settings.gain_min * (1 - (1 - STEADY) * steady)
