"""Places in a node's decode groups, promised to what its prefill groups run. No clock: `now` is seconds.

What would find no place waits before its prefill, where its class and its turn still count. A place is kept for one stream until that has
taken it, has ended, or is told to stay where it is. Between its end in the prefill group and its next submission it is on its way, for
WAY_S at most: then it went elsewhere, or nowhere.
"""

from dataclasses import dataclass

from nitsum.ledger import QUEUED_MAX, Entry, Ledger

Name = tuple[int, str]
"""Of a submission that has left: its session, and its request there."""
WAY_S = 2.0
"""A gateway needs milliseconds. One that is later finds its stream let in all the same: a stream that moves passes caps."""


@dataclass(frozen=True)
class _Place:
    ledger: Ledger
    kv_tokens: int


class Onward:
    """Of the groups of one pool on one node, by their ledgers; has one owner, as they have."""

    def __init__(self) -> None:
        self.prefill: tuple[Ledger, ...] = ()
        self.decode: tuple[Ledger, ...] = ()
        self._promised: dict[str, _Place] = {}
        """By request that runs where it prefills."""
        self._on_way: dict[Name, tuple[float, _Place]] = {}
        """Since when."""

    def link(self, prefill: tuple[Ledger, ...], decode: tuple[Ledger, ...]) -> tuple[Ledger, ...]:
        """From now on `prefill` hands over to `decode`; where that is empty it runs its streams whole. What runs is promised a place too;
        what is on its way to a ledger that takes in no longer has none. Returns those that this is news for: what waits there may start."""
        left, anew = tuple(p for p in self.prefill if p not in prefill and p.onward is self), decode != self.decode
        self.prefill, self.decode = prefill, decode
        for p in left:
            p.hand_over_to(None)
        for name in [name for name, (_, place) in self._on_way.items() if place.ledger not in decode]:
            self.arrived(name)
        way = self if decode else None
        news = tuple(p for p in prefill if anew or p.onward is not way)
        for p in news:
            p.hand_over_to(way)
        return *left, *news

    def _full(self, o: Ledger, entry: Entry) -> bool:
        there = len(o.running) + o.queued_total + o.reserved
        if not there:
            return False  # however long it is: it runs alone
        beyond = o.kv_tokens_max and o.kv_tokens + o.reserved_kv_tokens + entry.kv_tokens > o.kv_tokens_max
        return bool(beyond or (o.running_max and there >= o.running_max))

    def _load(self, o: Ledger) -> tuple[float, int]:
        there = len(o.running) + o.queued_total + o.reserved
        return there / (o.running_max or QUEUED_MAX), o.kv_tokens + o.reserved_kv_tokens

    def room(self, entry: Entry) -> bool:
        return not all(self._full(o, entry) for o in self.decode)

    def promise(self, entry: Entry) -> None:
        """The least loaded with room; of none: the least loaded."""
        taker = min(self.decode, key=lambda o: (self._full(o, entry), self._load(o)))
        self._promised[entry.rid] = _Place(taker, entry.kv_tokens)
        taker.reserve(1, entry.kv_tokens)

    def start(self) -> list[Entry]:
        """Starts what waits for places, as if in one queue: where one place comes free at a time, no group may always be the first."""
        started: list[Entry] = []
        while heads := [(not e.moved, e.admission, e.arrived, i) for i, p in enumerate(self.prefill) if (e := p.startable()) is not None]:
            entry = self.prefill[min(heads)[-1]].start_one()
            assert entry is not None
            started.append(entry)
        return started

    def place(self, rid: str) -> Ledger | None:
        """Where a request that runs has a place."""
        return self._promised[rid].ledger if rid in self._promised else None

    def release(self, rid: str) -> None:
        """It has ended where it prefilled, or stays there. What is on its way keeps its place."""
        if (place := self._promised.pop(rid, None)) is not None:
            place.ledger.reserve(-1, -place.kv_tokens)

    def depart(self, rid: str, name: Name, now: float) -> Ledger | None:
        """It leaves for its place, if it has one, which is kept until `name` has arrived. Its ledger is told of its end after this."""
        if (place := self._promised.pop(rid, None)) is None:
            return None
        self.arrived(name)
        self._on_way[name] = now, place
        return place.ledger

    def arrived(self, name: Name) -> bool:
        """It is submitted again, wherever, or never will be. False: nothing was kept."""
        if (kept := self._on_way.pop(name, None)) is None:
            return False
        kept[1].ledger.reserve(-1, -kept[1].kv_tokens)
        return True

    @property
    def on_way(self) -> tuple[Name, ...]:
        return tuple(self._on_way)

    def expire(self, now: float) -> None:
        """Gives up what is too long on its way."""
        for name in [name for name, (since, _) in self._on_way.items() if since + WAY_S <= now]:
            self.arrived(name)
