"""Admission of one group: what runs against its capacity, and three bounded queues in front of it. No clock: `now` is seconds.

Order: streams that moved here first, then feasible before best effort before background; within a queue by the client's own arrival. A
request that alone exceeds the KV capacity runs alone rather than never. Suspects (their engine crashed under them) run one at a time.

A stream that moved here (its group flipped) ran a moment ago and its client is reading: caps on how many run do not stop it, only the KV
capacity does. New work pays for that by waiting until the group is within its caps again.
"""

import bisect
from dataclasses import dataclass
from enum import IntEnum

from nitsum.layout import Capacity, TierShare


class Admission(IntEnum):
    FEASIBLE = 0
    BEST_EFFORT = 1
    BACKGROUND = 2


@dataclass(frozen=True)
class Entry:
    """`kv_tokens`: what it holds at its end, at most. `expires`: when it stops waiting."""

    rid: str
    tier: str
    admission: Admission
    kv_tokens: int
    arrived: float
    expires: float
    suspect: bool = False
    moved: bool = False


@dataclass(frozen=True)
class Admitted: ...


@dataclass(frozen=True)
class Queued: ...


@dataclass(frozen=True)
class Full:
    retry_after_ms: int


Answer = Admitted | Queued | Full

QUEUED_MAX = 1024
RETRY_AFTER_MS = (100, 30_000)


class Ledger:
    def __init__(self, capacity: Capacity, shares: tuple[TierShare, ...] = (), kv_tokens_max: int = 0) -> None:
        self.set_capacity(capacity, shares, kv_tokens_max)
        self.running: dict[str, Entry] = {}
        self._queues: tuple[list[Entry], ...] = ([], [], [])
        self._finish_gap_s = 1.0
        """Smoothed time between two finishes: the pace at which the queue drains."""
        self._finished_at: float | None = None

    def set_capacity(self, capacity: Capacity, shares: tuple[TierShare, ...], kv_tokens_max: int) -> None:
        """What already runs goes on. `kv_tokens_max`: what the engine has; 0: not limited."""
        limits = [n for n in (capacity.max_kv_tokens, kv_tokens_max) if n]
        self.kv_tokens_max = min(limits, default=0)
        self.running_max, self.queued_max = capacity.max_running, capacity.max_queued or QUEUED_MAX
        self.tier_max = {s.tier: s.max_running for s in shares if s.max_running}

    @property
    def kv_tokens(self) -> int:
        return sum(e.kv_tokens for e in self.running.values())

    def queued(self, admission: Admission) -> int:
        return len(self._queues[admission])

    @property
    def queued_total(self) -> int:
        return sum(map(len, self._queues))

    def _blocked(self, entry: Entry) -> bool:
        """By the group as a whole: nothing behind it may start either."""
        if self.running_max and len(self.running) >= self.running_max and not entry.moved:
            return True
        return bool(self.running and self.kv_tokens_max and self.kv_tokens + entry.kv_tokens > self.kv_tokens_max)

    def _held(self, entry: Entry) -> bool:
        """By a cap of its own kind: others may pass it."""
        if entry.suspect and any(e.suspect for e in self.running.values()):
            return True
        cap = 0 if entry.moved else self.tier_max.get(entry.tier, 0)
        return bool(cap and sum(e.tier == entry.tier for e in self.running.values()) >= cap)

    def submit(self, entry: Entry, now: float) -> Answer:
        assert entry.rid not in self.running, entry.rid
        ahead = any(self._queues[: entry.admission + 1]) and not entry.moved
        if not self._held(entry) and not self._blocked(entry) and not (ahead and self._startable()):
            self.running[entry.rid] = entry
            return Admitted()
        if self.queued_total >= self.queued_max * (2 if entry.moved else 1):  # bounded, but new work gives way first
            wait_ms = int(1e3 * self._finish_gap_s * (self.queued_total + 1))
            return Full(min(max(wait_ms, RETRY_AFTER_MS[0]), RETRY_AFTER_MS[1]))
        bisect.insort(self._queues[entry.admission], entry, key=lambda e: e.arrived)
        return Queued()

    def _startable(self) -> Entry | None:
        waiting = [e for queue in self._queues for e in queue]
        for entry in sorted(waiting, key=lambda e: not e.moved):
            if not self._held(entry):
                return None if self._blocked(entry) else entry
        return None

    def start(self) -> list[Entry]:
        """Moves what may start from the queues to running, in order."""
        started = []
        while (entry := self._startable()) is not None:
            self._queues[entry.admission].remove(entry)
            self.running[entry.rid] = entry
            started.append(entry)
        return started

    def finish(self, rid: str, now: float) -> list[Entry]:
        """Ends a running or a waiting request; returns those that start in its place."""
        if self.running.pop(rid, None) is not None:
            if self._finished_at is not None:
                self._finish_gap_s += 0.2 * (now - self._finished_at - self._finish_gap_s)
            self._finished_at = now
        else:
            for queue in self._queues:
                queue[:] = [e for e in queue if e.rid != rid]
        return self.start()

    def expire(self, now: float) -> list[Entry]:
        """Takes out what has waited too long."""
        late = [e for q in self._queues for e in q if e.expires <= now]
        for queue in self._queues:
            queue[:] = [e for e in queue if e.expires > now]
        return late

    def empty_queues(self) -> list[Entry]:
        waiting = [e for q in self._queues for e in q]
        for queue in self._queues:
            queue.clear()
        return waiting

    def clear(self) -> None:
        """The engine is gone: nothing runs, nothing waits."""
        self.running.clear()
        self.empty_queues()
