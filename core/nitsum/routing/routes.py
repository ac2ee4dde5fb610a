"""The groups that a gateway knows, kept in order."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from nitsum.layout import Role
from nitsum.routing.view import GroupView, Key

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
