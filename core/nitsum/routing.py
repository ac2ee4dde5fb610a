"""Which group takes a request, and what becomes of a request whose group ends under it. Pure: the simulator runs this very code.

`decide` orders the groups that may take it, `affinity` says which may have its KV. `Stream` owns one request from arrival to end: every
token the client gets is one that an engine generated right after those before it; none is lost, none repeated, however often it moves.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from nitsum.layout import Role

HOPS_MAX = 64
"""Submissions of one request, refusals included, since its last token."""
WAIT_S_MAX = 60.0
"""Longest time that a request waits for a group, since its last token."""
RETRY_S = 0.05
"""Before the first new look at the routes while no group takes it; doubles up to RETRY_S_MAX."""
RETRY_S_MAX = 1.0
GAP = 0.25
"""How much fuller than the least loaded a group may be, in parts of what it can run within SLO, that has the KV of a whole prompt; as much
less as it has less of it. What it costs if nothing is found: docs/benchmarks.md."""
FROM_STORE = 0.5
"""What KV in the node's store is worth beside KV in the engine: it must be loaded, and the store is small."""


class AdmissionClass(StrEnum):
    FEASIBLE = "Feasible"
    BEST_EFFORT = "BestEffort"
    BACKGROUND = "Background"


@dataclass(frozen=True)
class GroupView:
    """A group as the gateway last heard of it. `key` is unique in the fleet: (agent id, group id)."""

    key: tuple[str, str]
    epoch: int
    serving: bool
    """Open, or opening: it takes submissions."""
    tiers: frozenset[str]
    """Tiers it is meant for; empty: all."""
    running: int = 0
    queued: int = 0
    capacity: int = 0
    """Requests it can run within SLO; 0: not limited."""
    hint: bool = False
    """Its node does not list it as serving (any more): worth asking only for where it went."""
    role: Role = Role.MIXED
    """Streams that have a token go where decoding is done, elsewhere if that is full. New requests go where prompts are prefilled, full or
    not: a prompt in a group that decodes alone would stall all streams of its steps."""

    @property
    def load(self) -> float:
        busy = self.running + self.queued
        return busy / self.capacity if self.capacity else float(busy)

    @property
    def feasible(self) -> bool:
        return not self.capacity or self.running + self.queued < self.capacity


@dataclass(frozen=True)
class Choice:
    """Groups to try, best first (at most two)."""

    groups: tuple[GroupView, ...]
    admission: AdmissionClass


Key = tuple[str, str]


class Warm(NamedTuple):
    """A group that ran the first `share` (0 to 1) of a prompt's tokens: it may have their KV while its epoch lasts, its node longer."""

    key: Key
    epoch: int
    share: float


Rank = tuple[bool, bool, bool, float, Key]
"""Order of groups: those whose role suits, those worth a try, those with room, the least loaded, then by key."""


class _Ordered:
    """Serving groups in order, for new requests or for those that have started. One list for each set of tiers that groups are meant for:
    there are few of these, and so a group stands in one list only."""

    def __init__(self, started: bool) -> None:
        self.started = started
        self.ranks: dict[Key, tuple[Rank, list[Rank]]] = {}
        self.lists: dict[frozenset[str], list[Rank]] = {}
        self.meant: dict[str, list[list[Rank]]] = {}
        """By tier: lists of groups meant for it."""

    def put(self, g: GroupView) -> None:
        if not g.serving:
            return self.remove(g.key)
        rank = (not g.role.suits(self.started), g.hint, not g.feasible, g.load, g.key)
        ranks = self.lists.get(g.tiers)
        if ranks is None:
            ranks = self.lists[g.tiers] = []
            self.meant = {}
        was = self.ranks.get(g.key)
        if was is not None:
            if was[1] is ranks and was[0] == rank:
                return
            del was[1][bisect_left(was[1], was[0])]
        self.ranks[g.key] = rank, ranks
        insort(ranks, rank)

    def remove(self, key: Key) -> None:
        if (was := self.ranks.pop(key, None)) is not None:
            del was[1][bisect_left(was[1], was[0])]

    def best(self, tier: str, avoid: frozenset[Key]) -> tuple[list[Key], bool]:
        """(at most two groups, whether they are meant for the tier)."""
        if (lists := self.meant.get(tier)) is None:
            lists = self.meant[tier] = [ranks for tiers, ranks in self.lists.items() if not tiers or tier in tiers]
        meant = any(lists)
        found: list[Rank] = []
        late: list[Rank] = []
        asked = lists if meant else self.lists.values()
        prefills = not self.started and any([ranks and not ranks[0][0] and not ranks[0][1] for ranks in asked])
        for ranks in asked:
            left = 2
            for rank in ranks:
                if prefills and rank[0]:
                    break  # these only decode
                if rank[4] in avoid:
                    late.append(rank)
                    continue
                found.append(rank)
                left -= 1
                if not left:
                    break
        found.sort()
        if len(found) < 2:  # then every list was walked to its end
            found += sorted(late)
        return [rank[4] for rank in found[:2]], meant


class Routes:
    """A gateway's view, kept in the order in which `decide` wants it, so that a decision costs the same at 4 groups and at 4,000."""

    def __init__(self, view: Iterable[GroupView] = ()) -> None:
        self._views: dict[tuple[str, str], GroupView] = {}
        self._nodes: dict[str, dict[Key, None]] = {}
        self._new = _Ordered(False)
        self._started: _Ordered | None = None
        """None while every group is Mixed: then the order is one."""
        for g in view:
            self.put(g)

    def __iter__(self) -> Iterator[GroupView]:
        return iter(self._views.values())

    def get(self, key: tuple[str, str]) -> GroupView | None:
        return self._views.get(key)

    def put(self, g: GroupView) -> None:
        """News of a group, which may be new."""
        if g.key not in self._views:
            self._nodes.setdefault(g.key[0], {})[g.key] = None
        self._views[g.key] = g
        self._new.put(g)
        if self._started is not None:
            self._started.put(g)
        elif g.role is not Role.MIXED:
            self._started = _Ordered(True)
            for other in self._views.values():
                self._started.put(other)

    def remove(self, key: Key) -> None:
        if self._views.pop(key, None) is not None:
            del self._nodes[key[0]][key]
            if not self._nodes[key[0]]:
                del self._nodes[key[0]]
            self._new.remove(key)
            if self._started is not None:
                self._started.remove(key)

    def submitted(self, key: tuple[str, str]) -> None:
        """One more request than the node's last view counts."""
        if (g := self._views.get(key)) is not None:
            self.put(GroupView(g.key, g.epoch, g.serving, g.tiers, g.running + 1, g.queued, g.capacity, g.hint, g.role))

    def on_node(self, agent_id: str) -> list[GroupView]:
        return [self._views[key] for key in self._nodes.get(agent_id, ())]

    def best(self, tier: str, started: bool, avoid: frozenset[tuple[str, str]]) -> tuple[tuple[GroupView, ...], bool]:
        """(at most two groups, whether they are meant for the tier)."""
        keys, meant = (self._started if started and self._started is not None else self._new).best(tier, avoid)
        return tuple(self._views[key] for key in keys), meant


View = tuple[GroupView, ...] | Routes


def decide(
    tier: str,
    background: bool,
    view: View,
    avoid: frozenset[tuple[str, str]] = frozenset(),
    started: bool = False,
    warm: tuple[Warm, ...] = (),
) -> Choice | None:
    """Least loaded first, groups meant for the tier before others, of those the ones whose role suits; those that just refused it last.
    What has no token yet goes to groups that only decode where nothing else serves it. None: nothing serves.

    Before all of them comes the first of `warm`, longest prefix first, that would start it at once and is not much fuller (`GAP`)."""
    if isinstance(view, Routes):
        groups, meant = view.best(tier, started, avoid)
    else:
        open_groups = [g for g in view if g.serving]
        pool = [g for g in open_groups if not g.tiers or tier in g.tiers]
        meant = bool(pool)
        pool = pool or open_groups
        if not started and any(g.role.suits(False) and not g.hint for g in pool):
            pool = [g for g in pool if g.role.suits(False)]
        ordered = sorted(pool, key=lambda g: (g.key in avoid, not g.role.suits(started), g.hint, not g.feasible, g.load, g.key))
        groups = tuple(ordered[:2])
    if not groups:
        return None
    if warm and (g := _with_prefix(tier, view, avoid, started, warm, groups[0].load)) is not None:
        groups = (g, *[o for o in groups if o.key != g.key][:1])
    admission = AdmissionClass.FEASIBLE if meant and groups[0].feasible else AdmissionClass.BEST_EFFORT
    return Choice(groups, AdmissionClass.BACKGROUND if background else admission)


def _with_prefix(tier: str, view: View, avoid: frozenset[Key], started: bool, warm: tuple[Warm, ...], least: float) -> GroupView | None:
    """The group with the longest prefix, else the best one of its node, if it is all that comes before load in the order and has no queue:
    where there is one, the least loaded is feasible too. Groups that have less of it than the node's store is worth are not looked at."""

    def fits(g: GroupView, share: float) -> bool:
        return (
            g.load <= least + GAP * share
            and not g.queued
            and g.feasible
            and g.serving
            and not g.hint
            and (not g.tiers or tier in g.tiers)
            and g.role.suits(started)
            and g.key not in avoid
        )

    stored = warm[0].share * FROM_STORE
    get = view.get if isinstance(view, Routes) else {g.key: g for g in view}.get
    for w in warm:
        if w.share >= stored and (g := get(w.key)) is not None and g.epoch == w.epoch and fits(g, w.share):
            return g
    node = warm[0].key[0]
    near = view.on_node(node) if isinstance(view, Routes) else [g for g in view if g.key[0] == node]
    return min((g for g in near if fits(g, stored)), key=lambda g: (g.load, g.key), default=None)


# What happened to a stream


@dataclass(frozen=True)
class Tokens:
    """From the submission `hop`; older hops are ignored."""

    hop: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    hop: int


@dataclass(frozen=True)
class Moved:
    """Its group ended under it, or refused it as moved. Successors are group keys, best first."""

    hop: int
    successors: tuple[tuple[tuple[str, str], int], ...] = ()


@dataclass(frozen=True)
class Refused:
    hop: int
    retry_after_ms: int = 0
    fatal: str = ""
    """Why no other group would take it either."""
    status: int = 400
    """HTTP status of a fatal one."""


@dataclass(frozen=True)
class Crashed:
    """Its engine died with it aboard."""

    hop: int


@dataclass(frozen=True)
class NodeLost:
    """The line to its node broke; the engine may be well."""

    hop: int


@dataclass(frozen=True)
class Retried:
    """Time has passed since no group took it."""


@dataclass(frozen=True)
class ClientGone:
    pass


Event = Tokens | Finished | Moved | Refused | Crashed | NodeLost | Retried | ClientGone


# What to do about it


@dataclass(frozen=True)
class Submit:
    """prompt + `resume` generated tokens to this group."""

    hop: int
    group: tuple[str, str]
    epoch: int
    admission: AdmissionClass
    resume: int
    suspect: bool


@dataclass(frozen=True)
class Deliver:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Retry:
    after_s: float


@dataclass(frozen=True)
class Abort:
    hop: int
    group: tuple[str, str]


@dataclass(frozen=True)
class Fail:
    """To the client: an HTTP status and a message."""

    status: int
    message: str
    retry_after_ms: int = 0


@dataclass(frozen=True)
class Done:
    pass


Command = Submit | Deliver | Retry | Abort | Fail | Done


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
