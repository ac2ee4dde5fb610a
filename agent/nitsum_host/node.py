"""What the host knows: engines, groups with epochs and ledgers, streams; and what it says of them.

What happens to it is in `streams.py`, `places.py` and `groups.py`. All of it runs on one event loop and never blocks.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from nitsum.layout import Group, Layout
from nitsum.ledger import Admission, Ledger
from nitsum.onward import Onward
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.port import Engine, EngineInfo, Limits

State = types_pb2.GroupState


class Session(Protocol):
    """One gateway front on the node data port."""

    number: int

    def send(self, frame: node_pb2.AttachResponse) -> None: ...


@dataclass
class Live:
    """A group in the table."""

    group: Group
    wire: types_pb2.Group
    state: "State.ValueType"
    ledger: Ledger
    waiting: "dict[str, Stream]" = field(default_factory=dict)
    """Gathered, by rid, while its engine is not awake."""


@dataclass(eq=False)
class Stream:
    """One submission. `rid` is the engine's name for it; from `expires` on it waits for its turn no longer."""

    rid: str
    session: Session
    submit: node_pb2.Submit
    group_id: str
    arrived: float
    expires: float
    on_engine: bool = False
    moving: bool = False
    """It is being aborted so that it goes on elsewhere."""
    gone: bool = False
    """So is its client: it goes on nowhere."""
    begun: bool = False
    """Tokens have come of it."""
    tokens: int = 0


@dataclass(eq=False)
class Slot:
    """A resident engine. `restarts` counts all, `failures` those in a row."""

    engine: Engine
    wire: types_pb2.ResidentEngine
    info: EngineInfo | None = None
    state: "agent_pb2.EngineReport.State.ValueType" = agent_pb2.EngineReport.STATE_STARTING
    restarts: int = 0
    message: str = ""
    awake: bool = False
    """It is awake, or may be: nothing else may wake on its GPUs (`awake.py`)."""
    ended: bool = False
    """The engine in this slot is over; another one may come."""
    leaving: bool = False
    stuck: bool = False
    """Its processes do not end."""
    failures: int = 0
    up_since: float = 0.0
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    revival: "asyncio.Task[None] | None" = None


class Node:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.slots: dict[str, Slot] = {}
        self.groups: dict[str, Live] = {}
        self.closed: dict[str, tuple[str, ...]] = {}
        """Successors by id of groups that are gone."""
        self.streams: dict[str, Stream] = {}
        self.by_request: dict[tuple[int, str], str] = {}
        self.onward: dict[str, Onward] = {}
        """By pool: places in groups that decode, for what others prefill. Names of what is on its way are as in `by_request`."""
        self.sessions: set[Session] = set()
        self.draining = False
        self.changed = asyncio.Event()
        """Set at the next change, and replaced by a new one."""
        self.serial = 0
        """Of the last stream."""

    def touch(self) -> None:
        """Something that reports show has changed."""
        self.changed.set()
        self.changed = asyncio.Event()
        self.show()

    def show(self) -> None:
        """Tells every gateway how the groups are."""
        view = self.view()
        for session in self.sessions:
            session.send(view)

    @property
    def layout(self) -> Layout:
        return Layout(tuple(live.group for live in self.groups.values() if live.state != State.GROUP_STATE_OPENING))

    def successors(self, group_id: str) -> list[node_pb2.Successor]:
        """Groups that take over, with the epoch at which they serve or will serve."""
        if self.draining:
            return []
        ids = [group_id] if group_id in self.groups and self.groups[group_id].state == State.GROUP_STATE_OPEN else []
        ids += self.closed.get(group_id, ())
        return [node_pb2.Successor(group_id=i, epoch=self.groups[i].wire.epoch) for i in ids if i in self.groups]

    def limits(self, engine_id: str) -> Limits:
        """What the groups on it say: one that opens before one that closes."""
        ours = [live for live in self.groups.values() if live.group.engine_id == engine_id]
        ours.sort(key=lambda live: live.state == State.GROUP_STATE_CLOSING)
        return Limits(ours[0].group.capacity.prefill_tokens_per_step) if ours else Limits()

    # Reports

    def load(self, live: Live) -> types_pb2.GroupLoad:
        slot = self.slots.get(live.group.engine_id)
        return types_pb2.GroupLoad(
            running=len(live.ledger.running),
            queued_feasible=live.ledger.queued(Admission.FEASIBLE),
            queued_best_effort=live.ledger.queued(Admission.BEST_EFFORT) + len(live.waiting),
            queued_background=live.ledger.queued(Admission.BACKGROUND),
            resident_tokens=sum(s.tokens for s in self.streams.values() if s.group_id == live.group.group_id),
            kv_capacity_tokens=slot.info.max_total_tokens if slot and slot.info else 0,
        )

    def report(self, live: Live) -> agent_pb2.GroupReport:
        report = agent_pb2.GroupReport(group=live.wire, state=live.state, load=self.load(live))
        slot = self.slots.get(live.group.engine_id)
        if slot is not None and live.state == State.GROUP_STATE_OPEN:
            report.steps.extend(slot.engine.timings.steps)
            report.steps_serial = slot.engine.timings.serial
        return report

    def view(self) -> node_pb2.AttachResponse:
        # Gateways ask a closing group last, and only where its work went: what a node that drains wants.
        closing = State.GROUP_STATE_CLOSING if self.draining else None
        groups = [
            node_pb2.NodeView.GroupView(
                group_id=i, epoch=live.wire.epoch, state=closing or live.state, load=self.load(live), capacity=live.wire.capacity
            )
            for i, live in self.groups.items()
        ]
        return node_pb2.AttachResponse(view=node_pb2.NodeView(groups=groups))
