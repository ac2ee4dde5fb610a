"""What the host knows: engines, groups with epochs and ledgers, streams. Everything here runs on one event loop and never blocks."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

from nitsum.layout import Group, Layout, Role
from nitsum.ledger import Admission, Admitted, Entry, Full, Ledger, kv_promise
from nitsum.onward import Onward
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.port import Engine, EngineInfo, EngineRequest, Limits

log = logging.getLogger(__name__)
Finish, Refused = node_pb2.Finish, node_pb2.Refused
State = types_pb2.GroupState
QUEUE_S = 60.0
"""How long a request may wait for its turn when the gateway does not say."""
CLOSED_REMEMBERED_MAX = 512
WAITING_MAX = 1024
"""Requests that gather at a group whose engine is not awake yet."""
ADMISSIONS = {
    types_pb2.ADMISSION_FEASIBLE: Admission.FEASIBLE,
    types_pb2.ADMISSION_BEST_EFFORT: Admission.BEST_EFFORT,
    types_pb2.ADMISSION_BACKGROUND: Admission.BACKGROUND,
}


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
        self._serial = 0

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

    # Requests

    def submit(self, session: Session, submit: node_pb2.Submit) -> None:
        arrived = self._arrived((session.number, submit.follows))
        self._submit(session, submit)
        if arrived:  # and maybe taken by none
            self._refill()

    def _submit(self, session: Session, submit: node_pb2.Submit) -> None:
        request = session.number, submit.request_id
        if not submit.request_id or request in self.by_request:
            return self._refuse(session, submit.request_id, Refused.REASON_INVALID, "request_id: empty, or in flight already")
        if self.draining:
            return self._refuse(session, submit.request_id, Refused.REASON_DRAINING, "the node is draining", submit.group_id)
        live = self.groups.get(submit.group_id)
        if live is None:
            known = submit.group_id in self.closed
            reason = Refused.REASON_MOVED if known else Refused.REASON_UNKNOWN_GROUP
            return self._refuse(session, submit.request_id, reason, "the group is gone", submit.group_id)
        if live.state == State.GROUP_STATE_CLOSING or submit.epoch != live.wire.epoch:
            return self._refuse(session, submit.request_id, Refused.REASON_MOVED, "the group has moved on", submit.group_id)
        if not submit.input_ids or submit.resume_k >= len(submit.input_ids):
            text = f"resume_k: {submit.resume_k} of {len(submit.input_ids)} input_ids leaves no prompt"
            return self._refuse(session, submit.request_id, Refused.REASON_INVALID, text)
        slot = self.slots.get(live.group.engine_id)
        longest = slot.info.max_req_input_len if slot and slot.info else 0
        if longest and len(submit.input_ids) > longest:
            return self._refuse(
                session, submit.request_id, Refused.REASON_TOO_LONG, f"{len(submit.input_ids)} tokens, at most {longest} fit"
            )
        self._serial += 1
        now = time.monotonic()
        expires = now + (submit.queue_ms / 1e3 if submit.queue_ms else QUEUE_S)
        stream = Stream(f"{session.number}-{self._serial}.", session, submit, submit.group_id, now - submit.age_ms / 1e3, expires)
        self.streams[stream.rid] = stream
        self.by_request[request] = stream.rid
        if live.state == State.GROUP_STATE_OPEN:
            self._admit(live, stream)
        elif len(live.waiting) >= WAITING_MAX:
            self._refuse_stream(stream, Refused.REASON_FULL, "the group is not awake yet and its waiting room is full", 1000)
        else:
            live.waiting[stream.rid] = stream

    def _admit(self, live: Live, stream: Stream) -> None:
        s, now = stream.submit, time.monotonic()
        left = max(s.sampling.max_new_tokens - s.resume_k, 1)
        admission = ADMISSIONS.get(s.admission, Admission.BEST_EFFORT)
        resumed, kv_tokens = s.resume_k > 0, kv_promise(len(s.input_ids), left)
        moved = resumed and not s.suspect
        entry = Entry(stream.rid, s.tier, admission, kv_tokens, stream.arrived, stream.expires, s.suspect, moved, stays=resumed)
        answer = live.ledger.submit(entry, now)
        if isinstance(answer, Full):
            return self._refuse_stream(stream, Refused.REASON_FULL, "the group's queues are full", answer.retry_after_ms)
        admitted = node_pb2.Admitted(request_id=s.request_id, admission=s.admission)
        stream.session.send(node_pb2.AttachResponse(admitted=admitted))
        if isinstance(answer, Admitted):
            self._start(live, stream)

    def _start(self, live: Live, stream: Stream) -> None:
        stream.on_engine = True
        self.slots[live.group.engine_id].engine.submit(EngineRequest(stream.rid, stream.submit))

    def _started(self, live: Live, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.rid in self.streams:
                self._start(live, self.streams[entry.rid])

    def abort(self, session: Session, request_id: str) -> None:
        rid = self.by_request.get((session.number, request_id))
        if rid is None:
            if self._arrived((session.number, request_id)):
                self._refill()
            return
        stream = self.streams[rid]
        stream.gone = True
        live = self.groups.get(stream.group_id)
        if stream.on_engine and live is not None:
            self.slots[live.group.engine_id].engine.abort(rid)
        else:
            self._finish(stream, Finish(kind=Finish.KIND_ABORTED))

    def leave(self, session: Session) -> None:
        """A gateway is gone: so are its requests."""
        self.sessions.discard(session)
        for stream in [s for s in self.streams.values() if s.session is session]:
            self.abort(session, stream.submit.request_id)
        for onward in self.onward.values():
            for name in [name for name in onward.on_way if name[0] == session.number]:
                onward.arrived(name)
        self._refill()

    def expire(self) -> None:
        now = time.monotonic()
        for onward in self.onward.values():
            onward.expire(now)
        self._refill()
        for live in self.groups.values():
            late = [self.streams[e.rid] for e in live.ledger.expire(now) if e.rid in self.streams]
            for stream in [*late, *(s for s in live.waiting.values() if s.expires <= now)]:
                self._refuse_stream(stream, Refused.REASON_QUEUE_TIMEOUT, "waited too long for its turn", 1000)
            self._started(live, live.ledger.start())

    # What engines say

    def on_step(self, deltas: list[node_pb2.TokenDelta]) -> None:
        batches: dict[Session, node_pb2.TokenBatch] = {}
        for delta in deltas:
            stream = self.streams.get(delta.request_id)
            if stream is None:
                continue
            delta.request_id = stream.submit.request_id
            stream.tokens = delta.prompt_tokens + delta.completion_tokens
            if delta.HasField("finish"):
                if stream.moving and delta.finish.kind == Finish.KIND_ABORTED and not stream.gone:
                    after = self._departs(stream) or self.successors(stream.group_id)
                    delta.finish.CopyFrom(Finish(kind=Finish.KIND_MOVED, successors=after))
                self._forget(stream)
            elif delta.token_ids:
                self._hand_over(stream)
                stream.begun = True
            batches.setdefault(stream.session, node_pb2.TokenBatch()).deltas.append(delta)
        for session, batch in batches.items():
            session.send(node_pb2.AttachResponse(tokens=batch))

    # Hand-over

    def link(self) -> None:
        """Groups that prefill look at those that decode, as they are now; after each change of what is open, or in which role."""
        opened = [live for live in self.groups.values() if live.state == State.GROUP_STATE_OPEN]
        pools = {live.group.pool for live in self.groups.values()}
        for pool in sorted(pools | self.onward.keys()):
            ours = [live for live in opened if live.group.pool == pool and not self.draining]
            prefill, decode = (tuple(live.ledger for live in ours if live.group.role is role) for role in (Role.PREFILL, Role.DECODE))
            self.onward.setdefault(pool, Onward()).link(prefill, decode)
        for pool in self.onward.keys() - pools:
            del self.onward[pool]
        self._refill()
        for live in opened:
            self._started(live, live.ledger.start())

    def _hand_over(self, stream: Stream) -> None:
        """To the group where a place is promised to it, once its first token is there, for then the KV of its prompt is in the node's
        store. Once at most: what comes back, since no other group took it, has no place and stays. So does what has begun before there was
        one: the KV of what it made would be computed again in the steps of those that decode."""
        live = self.groups[stream.group_id]
        onward = self.onward[live.group.pool]
        if stream.moving or onward.place(stream.rid) is None:
            return
        if stream.begun:
            onward.release(stream.rid)
            self._refill()
        else:
            stream.moving = True
            self.slots[live.group.engine_id].engine.abort(stream.rid)

    def _departs(self, stream: Stream) -> list[node_pb2.Successor]:
        """To the group that keeps a place for it, if one does: a flip may have come between."""
        name = stream.session.number, stream.submit.request_id
        taker = self.onward[self.groups[stream.group_id].group.pool].depart(stream.rid, name, time.monotonic())
        found = [live for live in self.groups.values() if live.ledger is taker]
        return [node_pb2.Successor(group_id=live.group.group_id, epoch=live.wire.epoch) for live in found]

    def _arrived(self, name: tuple[int, str]) -> bool:
        return any([onward.arrived(name) for onward in self.onward.values()])

    def _refill(self) -> None:
        """Starts what has waited for a place that may be free now."""
        for entry in [e for onward in self.onward.values() for e in onward.start()]:
            if entry.rid in self.streams:
                stream = self.streams[entry.rid]
                self._start(self.groups[stream.group_id], stream)

    # The end of an engine

    def on_engine_ended(self, engine_id: str, message: str) -> None:
        """Its streams are told; its group waits for the engine that comes back."""
        slot = self.slots.get(engine_id)
        if slot is not None:
            slot.state, slot.message = agent_pb2.EngineReport.STATE_FAILED, message[:500]
        hit = [g for g in self.groups.values() if g.group.engine_id == engine_id]
        for live in hit:
            live.ledger.clear()  # first: what ends below must not make room on a dead engine
            if live.state == State.GROUP_STATE_OPEN:
                live.state = State.GROUP_STATE_FAILED
        self.link()
        for live in hit:
            ours = [s for s in self.streams.values() if s.group_id == live.group.group_id and s.rid not in live.waiting]
            for stream in ours:
                crashed = stream.on_engine and not stream.moving
                kind = Finish.KIND_ENGINE_CRASHED if crashed else Finish.KIND_MOVED
                self._finish(stream, Finish(kind=kind, successors=self.successors(live.group.group_id)))
        self.touch()

    # The end of a stream

    def _forget(self, stream: Stream) -> None:
        self.streams.pop(stream.rid, None)
        self.by_request.pop((stream.session.number, stream.submit.request_id), None)
        live = self.groups.get(stream.group_id)
        if live is None:
            return
        live.waiting.pop(stream.rid, None)
        live.ledger.release(stream.rid, time.monotonic())
        self._refill()
        self._started(live, live.ledger.start())

    def _finish(self, stream: Stream, finish: node_pb2.Finish) -> None:
        self._forget(stream)
        delta = node_pb2.TokenDelta(request_id=stream.submit.request_id, finish=finish)
        stream.session.send(node_pb2.AttachResponse(tokens=node_pb2.TokenBatch(deltas=[delta])))

    def _refuse_stream(self, stream: Stream, reason: "node_pb2.Refused.Reason.ValueType", message: str, retry_after_ms: int = 0) -> None:
        self._forget(stream)
        self._refuse(stream.session, stream.submit.request_id, reason, message, stream.group_id, retry_after_ms)

    def _refuse(
        self,
        session: Session,
        request_id: str,
        reason: "node_pb2.Refused.Reason.ValueType",
        message: str,
        group_id: str = "",
        retry_after_ms: int = 0,
    ) -> None:
        successors = self.successors(group_id) if reason in (Refused.REASON_MOVED, Refused.REASON_DRAINING) else []
        refused = Refused(request_id=request_id, reason=reason, message=message, epoch=self.epoch, successors=successors)
        refused.retry_after_ms = retry_after_ms
        session.send(node_pb2.AttachResponse(refused=refused))

    def successors(self, group_id: str) -> list[node_pb2.Successor]:
        """Groups that take over, with the epoch at which they serve or will serve."""
        if self.draining:
            return []
        ids = [group_id] if group_id in self.groups and self.groups[group_id].state == State.GROUP_STATE_OPEN else []
        ids += self.closed.get(group_id, ())
        return [node_pb2.Successor(group_id=i, epoch=self.groups[i].wire.epoch) for i in ids if i in self.groups]

    # Groups, as flips move them

    def known(self, group: Group, wire: types_pb2.Group, epoch: int, state: "State.ValueType") -> Live:
        slot = self.slots.get(group.engine_id)
        wire = types_pb2.Group.FromString(wire.SerializeToString())
        wire.epoch = epoch
        ledger = Ledger(group.capacity, group.shares, slot.info.max_total_tokens if slot and slot.info else 0)
        self.groups[group.group_id] = live = Live(group, wire, state, ledger)
        self.closed.pop(group.group_id, None)
        return live

    def close(self, successors: dict[str, tuple[str, ...]]) -> None:
        """Groups, each with those that take over; together, so that none starts what another gives up."""
        waiting: list[str] = []
        for group_id, after in successors.items():
            live = self.groups[group_id]
            live.state = State.GROUP_STATE_CLOSING
            self._remember(group_id, after)
            waiting += [*(e.rid for e in live.ledger.empty_queues()), *live.waiting]
        self.link()
        for stream in [self.streams[rid] for rid in waiting if rid in self.streams]:
            self._refuse_stream(stream, Refused.REASON_MOVED, "the group is closing")

    def _remember(self, group_id: str, successors: tuple[str, ...]) -> None:
        self.closed.pop(group_id, None)
        self.closed[group_id] = successors
        while len(self.closed) > CLOSED_REMEMBERED_MAX:
            self.closed.pop(next(iter(self.closed)))

    def abort_streams(self, group_id: str) -> bool:
        """Aborts what runs on the group; False when nothing does."""
        live = self.groups[group_id]
        running = [s for s in self.streams.values() if s.group_id == group_id and s.on_engine]
        for stream in running:
            stream.moving = True
            self.slots[live.group.engine_id].engine.abort(stream.rid)
        return bool(running)

    def end_streams(self, group_id: str) -> None:
        """What has not ended by itself is over now; its late tokens are dropped."""
        self.groups[group_id].ledger.empty_queues()  # first: what ends must not make room for what ends next
        for stream in [s for s in self.streams.values() if s.group_id == group_id]:
            self._finish(stream, Finish(kind=Finish.KIND_MOVED, successors=self.successors(group_id)))

    def open(self, *group_ids: str) -> None:
        """Together: what one of them gathered may need a place in another."""
        opened = [self.groups[group_id] for group_id in group_ids]
        for live in opened:
            live.state = State.GROUP_STATE_OPEN
            self.closed.pop(live.group.group_id, None)
        self.link()
        for live in opened:
            waiting, live.waiting = live.waiting, {}
            for stream in waiting.values():
                self._admit(live, stream)

    def remove(self, group_id: str, successors: tuple[str, ...]) -> None:
        live = self.groups[group_id]
        self._remember(group_id, successors)
        live.ledger.empty_queues()
        for stream in [s for s in self.streams.values() if s.group_id == group_id]:
            self._finish(stream, Finish(kind=Finish.KIND_MOVED, successors=self.successors(group_id)))
        assert not live.waiting
        del self.groups[group_id]
        self.link()

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
