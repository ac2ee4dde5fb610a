"""Admission of one group: what runs against its capacity, and three bounded queues in front of it. No clock: `now` is seconds.

Order: streams that moved here first, then feasible before best effort before background; within a queue by the client's own arrival. A
request that alone exceeds the KV capacity runs alone rather than never. Suspects (their engine crashed under them) run one at a time.

A stream that moved here (its group flipped) ran a moment ago and its client is reading: caps on how many run do not stop it, only the KV
capacity does. New work pays for that by waiting until the group is within its caps again.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Protocol

from nitsum.layout import Capacity, TierShare


class Admission(IntEnum):
    FEASIBLE = 0
    BEST_EFFORT = 1
    BACKGROUND = 2


NEW_TOKENS_MAX, NEW_TOKENS_RATIO = 4096, 0.3
"""Of the output that a client allows: the first as SGLang's scheduler counts it, the second within what its estimate moves (0.7 to 0.1)."""


def kv_promise(held: int, left: int) -> int:
    """KV tokens that a request counts with: `held` so far, and what of the `left` that its client allows it is expected to make.

    Clients allow far more than is made. Where too many make more, the engine itself retracts some.
    """
    return held + math.ceil(min(left, NEW_TOKENS_MAX) * NEW_TOKENS_RATIO)


@dataclass(frozen=True)
class Entry:
    """`kv_tokens`: see `kv_promise`. `expires`: when it stops waiting. `stays`: to its end, also where others are handed over."""

    rid: str
    tier: str
    admission: Admission
    kv_tokens: int
    arrived: float
    expires: float
    suspect: bool = False
    moved: bool = False
    stays: bool = False


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


class Places(Protocol):
    """Where what runs goes on when it has prefilled: see `onward`."""

    def room(self, entry: Entry) -> bool: ...
    def promise(self, entry: Entry) -> None: ...
    def release(self, rid: str) -> None: ...


class Ledger:
    def __init__(self, capacity: Capacity, shares: tuple[TierShare, ...] = (), kv_tokens_max: int = 0) -> None:
        self.set_capacity(capacity, shares, kv_tokens_max)
        self.running: dict[str, Entry] = {}
        self._queues: tuple[list[Entry], ...] = ([], [], [])
        self._kv_tokens = 0
        self._of_tier: dict[str, int] = {}
        self._suspects = 0
        self._moved_waiting = 0
        self._finish_gap_s = 1.0
        """Smoothed time between two finishes: the pace at which the queue drains."""
        self._finished_at: float | None = None
        self.onward: Places | None = None
        self.reserved = self.reserved_kv_tokens = 0
        """For what others will hand over."""

    def reserve(self, requests: int, kv_tokens: int) -> None:
        self.reserved += requests
        self.reserved_kv_tokens += kv_tokens

    def hand_over_to(self, onward: Places | None) -> None:
        """From now on; what runs is promised a place there too."""
        for entry in [e for e in self.running.values() if not e.stays]:
            if self.onward is not None:
                self.onward.release(entry.rid)
            if onward is not None:
                onward.promise(entry)
        self.onward = onward

    def set_capacity(self, capacity: Capacity, shares: tuple[TierShare, ...], kv_tokens_max: int) -> None:
        """What already runs goes on. `kv_tokens_max`: what the engine has; 0: not limited."""
        limits = [n for n in (capacity.max_kv_tokens, kv_tokens_max) if n]
        self.kv_tokens_max = min(limits, default=0)
        self.running_max, self.queued_max = capacity.max_running, capacity.max_queued or QUEUED_MAX
        self.tier_max = {s.tier: s.max_running for s in shares if s.max_running}

    @property
    def kv_tokens(self) -> int:
        """Promised to what runs."""
        return self._kv_tokens

    def _ran(self, entry: Entry, sign: int) -> None:
        """Keeps the sums over `running`, which decide for each request."""
        self._kv_tokens += sign * entry.kv_tokens
        self._of_tier[entry.tier] = self._of_tier.get(entry.tier, 0) + sign
        self._suspects += sign * entry.suspect
        if self.onward is not None and not entry.stays:
            if sign > 0:
                self.onward.promise(entry)
            else:
                self.onward.release(entry.rid)

    def _run(self, entry: Entry) -> None:
        self.running[entry.rid] = entry
        self._ran(entry, 1)

    def queued(self, admission: Admission) -> int:
        return len(self._queues[admission])

    @property
    def queued_total(self) -> int:
        return sum(map(len, self._queues))

    def _blocked(self, entry: Entry) -> bool:
        """By the group as a whole: nothing behind it may start either."""
        kept, kv_tokens = (0, 0) if entry.moved else (self.reserved, self.reserved_kv_tokens)
        if self.running_max and len(self.running) + kept >= self.running_max and not entry.moved:
            return True
        if self.onward is not None and not (entry.moved or entry.stays) and not self.onward.room(entry):
            return True
        beyond = self.kv_tokens_max and self._kv_tokens + kv_tokens + entry.kv_tokens > self.kv_tokens_max
        return bool(beyond and (self.running or kept))

    def _held(self, entry: Entry) -> bool:
        """By a cap of its own kind: others may pass it."""
        if entry.suspect and self._suspects:
            return True
        cap = 0 if entry.moved else self.tier_max.get(entry.tier, 0)
        return bool(cap and self._of_tier.get(entry.tier, 0) >= cap)

    def submit(self, entry: Entry, now: float) -> Answer:
        assert entry.rid not in self.running, entry.rid
        ahead = any(self._queues[: entry.admission + 1]) and not entry.moved
        if not self._held(entry) and not self._blocked(entry) and not (ahead and self.startable()):
            self._run(entry)
            return Admitted()
        before = sum(map(len, self._queues[: entry.admission + 1]))  # what waits behind it does not keep it out
        if before >= self.queued_max * (2 if entry.moved else 1):  # bounded, but new work gives way first
            wait_ms = int(1e3 * self._finish_gap_s * (self.queued_total + 1))
            return Full(min(max(wait_ms, RETRY_AFTER_MS[0]), RETRY_AFTER_MS[1]))
        bisect.insort(self._queues[entry.admission], entry, key=lambda e: e.arrived)
        self._moved_waiting += entry.moved
        return Queued()

    def startable(self) -> Entry | None:
        """What would start now; by then others may have taken its place."""
        for moved in (True, False) if self._moved_waiting else (False,):
            for entry in chain.from_iterable(self._queues):
                if entry.moved is moved and not self._held(entry):
                    return None if self._blocked(entry) else entry
        return None

    def start(self) -> list[Entry]:
        """Moves what may start from the queues to running, in order."""
        started = []
        while (entry := self.start_one()) is not None:
            started.append(entry)
        return started

    def start_one(self) -> Entry | None:
        if (entry := self.startable()) is not None:
            self._queues[entry.admission].remove(entry)
            self._moved_waiting -= entry.moved
            self._run(entry)
        return entry

    def finish(self, rid: str, now: float) -> list[Entry]:
        """Ends a running or a waiting request; returns those that start in its place."""
        self.release(rid, now)
        return self.start()

    def release(self, rid: str, now: float) -> None:
        """Ends it and starts none yet: what is handed over must have taken the place it was promised, before another is promised one."""
        if (ended := self.running.pop(rid, None)) is not None:
            self._ran(ended, -1)
            if self._finished_at is not None:
                self._finish_gap_s += 0.2 * (now - self._finished_at - self._finish_gap_s)
            self._finished_at = now
        else:
            self._keep(lambda e: e.rid != rid)

    def _keep(self, stays: Callable[[Entry], bool]) -> None:
        for queue in self._queues:
            queue[:] = [e for e in queue if stays(e)]
        self._moved_waiting = sum(e.moved for queue in self._queues for e in queue)

    def expire(self, now: float) -> list[Entry]:
        """Takes out what has waited too long."""
        late = [e for q in self._queues for e in q if e.expires <= now]
        if late:
            self._keep(lambda e: e.expires > now)
        return late

    def empty_queues(self) -> list[Entry]:
        waiting = [e for q in self._queues for e in q]
        self._keep(lambda _: False)
        return waiting

    def clear(self) -> None:
        """The engine is gone: nothing runs, nothing waits."""
        for entry in self.running.values():
            self._ran(entry, -1)
        self.running.clear()
        self.empty_queues()
