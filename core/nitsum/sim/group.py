"""A group on a simulated node: the production ledger in front of a simulated engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

from nitsum.layout import Group
from nitsum.ledger import Entry, Ledger
from nitsum.routing import GroupView, Stream
from nitsum.sim.engine import Engine, Seq
from nitsum.sim.request import Request

Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class Live:
    """A request on its way. `warm_at`: the node that has kept its KV."""

    request: Request
    rid: str
    gateway: int
    stream: Stream | None = None
    group: "SimGroup | None" = None
    seq: Seq | None = None
    first_at: float = -1.0
    door_ms: float = 0.0
    """Of the group that its first token came from."""
    made: int = 0
    warm_at: str = ""
    loads: bool = False
    """That KV must be loaded from the node's store before it runs."""
    starts: int = 0
    """Of its submissions to engines: a load that ends for an older one is of no use."""


@dataclass(slots=True, eq=False)
class SimGroup:
    """`open` False: its engine is not awake yet, what comes is gathered; or it closes, and what comes is sent on."""

    key: Key
    group: Group
    epoch: int
    engine: Engine
    ledger: Ledger
    open: bool = False
    closing: bool = False
    drained: Callable[[], None] | None = None
    """What a flip does when the last of `lives` has left, for which it waits."""
    due_at: float = -1.0
    loaded_at: float = 0.0
    """When the KV loads that are under way end; they share its links, so they go one after the other."""
    tiers: frozenset[str] = frozenset()
    lives: dict[str, Live] = field(default_factory=dict)
    """All that were submitted and have not left: running, queued, gathered."""
    gathered: list[tuple[Entry, Live]] = field(default_factory=list)

    def serve(self, group: Group, kv_tokens_max: int) -> None:
        """New shares and capacity; nothing restarts."""
        self.group = group
        self.tiers = frozenset(s.tier for s in group.shares if s.share > 0 or s.max_running)
        self.ledger.set_capacity(group.capacity, group.shares, kv_tokens_max)

    def view(self) -> GroupView:
        """As its node would report it now."""
        running, queued = len(self.ledger.running), self.ledger.queued_total + len(self.gathered)
        capacity, role = self.group.capacity.max_running, self.group.role
        return GroupView(self.key, self.epoch, not self.closing, self.tiers, running, queued, capacity, self.closing, role)
