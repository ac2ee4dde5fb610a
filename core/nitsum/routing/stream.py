"""A request from arrival to end: where it goes on when its group ends, refuses it or crashes, and when it is given up."""

from dataclasses import dataclass, field

from nitsum.routing.choose import decide
from nitsum.routing.messages import (
    Abort,
    ClientGone,
    Command,
    Crashed,
    Deliver,
    Done,
    Event,
    Fail,
    Finished,
    Moved,
    Refused,
    Retried,
    Retry,
    Submit,
    Tokens,
)
from nitsum.routing.routes import Routes, View
from nitsum.routing.view import AdmissionClass, Warm

HOPS_MAX = 64
"""Submissions of one request, refusals included, since its last token."""
WAIT_S_MAX = 60.0
"""Longest time that a request waits for a group, since its last token."""
RETRY_S = 0.05
"""Before the first new look at the routes while no group takes it; doubles up to RETRY_S_MAX."""
RETRY_S_MAX = 1.0


@dataclass
class Stream:
    """One request. `handle` is the only door; after Done or Fail nothing comes any more."""

    tier: str
    background: bool
    arrived: float
    hop: int = 0
    group: tuple[str, str] | None = None
    delivered: int = 0
    moves: int = 0
    crashes: int = 0
    ended: bool = False
    waiting_since: float | None = None
    waited_s: float = 0.0
    retries: int = 0
    last_hop: int = 0
    """The hop of the last token."""
    avoid: set[tuple[str, str]] = field(default_factory=set)
    warm: tuple[Warm, ...] = ()
    """Set by whoever knows, before the stream is placed."""

    def start(self, view: View, now: float) -> list[Command]:
        return self._place(view, now)

    def handle(self, event: Event, view: View, now: float) -> list[Command]:
        if self.ended:
            return []
        if isinstance(event, ClientGone):
            self.ended = True
            return [Abort(self.hop, self.group)] if self.group else []
        if isinstance(event, Retried):
            return self._place(view, now) if self.group is None else []
        if event.hop != self.hop or self.group is None:
            return []  # of a submission that is over
        if isinstance(event, Tokens):
            self.delivered += len(event.ids)
            self.avoid.clear()
            self.waited_s, self.retries, self.last_hop = 0.0, 0, self.hop
            return [Deliver(event.ids)]
        if isinstance(event, Finished):
            self.ended = True
            return [Done()]
        left, self.group = self.group, None
        if isinstance(event, Refused):
            if event.fatal:
                return self._fail(event.status, event.fatal)
            self.avoid.add(left)
            return self._place(view, now, full_ms=event.retry_after_ms or 1000)
        if isinstance(event, Crashed):
            self.crashes += 1
            if self.crashes > 1:
                return self._fail(500, "the engine crashed twice on this request")
        self.moves += 1
        if isinstance(event, Moved) and event.successors:
            return self._place(view, now, successors=event.successors)
        self.avoid.add(left)  # until the next look at the routes
        return self._place(view, now)

    def _fail(self, status: int, message: str, retry_after_ms: int = 0) -> list[Command]:
        self.ended = True
        self.group = None
        return [Fail(status, message, retry_after_ms)]

    def _place(self, view: View, now: float, successors: tuple[tuple[tuple[str, str], int], ...] = (), full_ms: int = 0) -> list[Command]:
        if self.waiting_since is not None:
            self.waited_s += max(now - self.waiting_since, 0.0)
            self.waiting_since = None
        if self.hop - self.last_hop >= HOPS_MAX:
            return self._fail(503, f"no group kept this request after {HOPS_MAX} tries")
        choice = decide(self.tier, self.background, view, frozenset(self.avoid), self.delivered > 0, self.warm)
        admission = choice.admission if choice else AdmissionClass.BACKGROUND if self.background else AdmissionClass.BEST_EFFORT
        if successors:  # the node knows better than our view, which is a second old
            key, epoch = min(successors, key=lambda s: (s[0] in self.avoid, *self._rank(view, s[0]), s[0]))
            return self._submit(key, epoch, admission)
        fresh = [g for g in choice.groups if g.key not in self.avoid] if choice else []
        if fresh:
            return self._submit(fresh[0].key, fresh[0].epoch, admission)
        started = self.delivered > 0 or self.moves > 0
        if full_ms and not started:  # every group refused a request that has not begun: shed it
            return self._fail(429, "every group of this pool is full; try again later", full_ms)
        if self.waited_s > WAIT_S_MAX:
            return self._fail(503, "no group serves this request")
        self.waiting_since = now
        self.avoid.clear()
        self.retries += 1
        return [Retry(min(RETRY_S * 2 ** min(self.retries - 1, 10), RETRY_S_MAX))]

    def _rank(self, view: View, key: tuple[str, str]) -> tuple[bool, float]:
        """Of a successor; one that we have not heard of is taken for an idle one that suits."""
        g = view.get(key) if isinstance(view, Routes) else next((g for g in view if g.key == key), None)
        return (not g.role.suits(self.delivered > 0), g.load) if g else (False, 0.0)

    def _submit(self, key: tuple[str, str], epoch: int, admission: AdmissionClass) -> list[Command]:
        self.hop += 1
        self.group = key
        return [Submit(self.hop, key, epoch, admission, self.delivered, self.crashes > 0)]
