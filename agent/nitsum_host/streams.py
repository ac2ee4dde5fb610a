"""A stream's life, from what a gateway submits to its last token or its refusal: what gateways ask, and what engines say."""

import time

from nitsum.ledger import Admission, Admitted, Entry, Full, kv_promise
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host.node import Live, Node, Session, State, Stream
from nitsum_host.places import arrived, departs, hand_over, refill, start, start_queued

Finish, Refused = node_pb2.Finish, node_pb2.Refused
QUEUE_S = 60.0
"""How long a request may wait for its turn when the gateway does not say."""
WAITING_MAX = 1024
"""Requests that gather at a group whose engine is not awake yet."""
ADMISSIONS = {
    types_pb2.ADMISSION_FEASIBLE: Admission.FEASIBLE,
    types_pb2.ADMISSION_BEST_EFFORT: Admission.BEST_EFFORT,
    types_pb2.ADMISSION_BACKGROUND: Admission.BACKGROUND,
}


def submit(node: Node, session: Session, submit: node_pb2.Submit) -> None:
    kept = arrived(node, (session.number, submit.follows))
    _submit(node, session, submit)
    if kept:  # and maybe taken by none
        refill(node)


def _submit(node: Node, session: Session, submit: node_pb2.Submit) -> None:
    request = session.number, submit.request_id
    if not submit.request_id or request in node.by_request:
        return _refuse(node, session, submit.request_id, Refused.REASON_INVALID, "request_id: empty, or in flight already")
    if node.draining:
        return _refuse(node, session, submit.request_id, Refused.REASON_DRAINING, "the node is draining", submit.group_id)
    live = node.groups.get(submit.group_id)
    if live is None:
        known = submit.group_id in node.closed
        reason = Refused.REASON_MOVED if known else Refused.REASON_UNKNOWN_GROUP
        return _refuse(node, session, submit.request_id, reason, "the group is gone", submit.group_id)
    if live.state == State.GROUP_STATE_CLOSING or submit.epoch != live.wire.epoch:
        return _refuse(node, session, submit.request_id, Refused.REASON_MOVED, "the group has moved on", submit.group_id)
    if not submit.input_ids or submit.resume_k >= len(submit.input_ids):
        text = f"resume_k: {submit.resume_k} of {len(submit.input_ids)} input_ids leaves no prompt"
        return _refuse(node, session, submit.request_id, Refused.REASON_INVALID, text)
    slot = node.slots.get(live.group.engine_id)
    longest = slot.info.max_req_input_len if slot and slot.info else 0
    if longest and len(submit.input_ids) > longest:
        text = f"{len(submit.input_ids)} tokens, at most {longest} fit"
        return _refuse(node, session, submit.request_id, Refused.REASON_TOO_LONG, text)
    node.serial += 1
    now = time.monotonic()
    expires = now + (submit.queue_ms / 1e3 if submit.queue_ms else QUEUE_S)
    stream = Stream(f"{session.number}-{node.serial}.", session, submit, submit.group_id, now - submit.age_ms / 1e3, expires)
    node.streams[stream.rid] = stream
    node.by_request[request] = stream.rid
    if live.state == State.GROUP_STATE_OPEN:
        admit(node, live, stream)
    elif len(live.waiting) >= WAITING_MAX:
        refuse_stream(node, stream, Refused.REASON_FULL, "the group is not awake yet and its waiting room is full", 1000)
    else:
        live.waiting[stream.rid] = stream


def admit(node: Node, live: Live, stream: Stream) -> None:
    s, now = stream.submit, time.monotonic()
    left = max(s.sampling.max_new_tokens - s.resume_k, 1)
    admission = ADMISSIONS.get(s.admission, Admission.BEST_EFFORT)
    resumed, kv_tokens = s.resume_k > 0, kv_promise(len(s.input_ids), left)
    moved = resumed and not s.suspect
    entry = Entry(stream.rid, s.tier, admission, kv_tokens, stream.arrived, stream.expires, s.suspect, moved, stays=resumed)
    answer = live.ledger.submit(entry, now)
    if isinstance(answer, Full):
        return refuse_stream(node, stream, Refused.REASON_FULL, "the group's queues are full", answer.retry_after_ms)
    admitted = node_pb2.Admitted(request_id=s.request_id, admission=s.admission)
    stream.session.send(node_pb2.AttachResponse(admitted=admitted))
    if isinstance(answer, Admitted):
        start(node, live, stream)


def abort(node: Node, session: Session, request_id: str) -> None:
    rid = node.by_request.get((session.number, request_id))
    if rid is None:
        if arrived(node, (session.number, request_id)):
            refill(node)
        return
    stream = node.streams[rid]
    stream.gone = True
    live = node.groups.get(stream.group_id)
    if stream.on_engine and live is not None:
        node.slots[live.group.engine_id].engine.abort(rid)
    else:
        finish(node, stream, Finish(kind=Finish.KIND_ABORTED))


def leave(node: Node, session: Session) -> None:
    """A gateway is gone: so are its requests."""
    node.sessions.discard(session)
    for stream in [s for s in node.streams.values() if s.session is session]:
        abort(node, session, stream.submit.request_id)
    for onward in node.onward.values():
        for name in [name for name in onward.on_way if name[0] == session.number]:
            onward.arrived(name)
    refill(node)


def expire(node: Node) -> None:
    now = time.monotonic()
    for onward in node.onward.values():
        onward.expire(now)
    refill(node)
    for live in node.groups.values():
        late = [node.streams[e.rid] for e in live.ledger.expire(now) if e.rid in node.streams]
        for stream in [*late, *(s for s in live.waiting.values() if s.expires <= now)]:
            refuse_stream(node, stream, Refused.REASON_QUEUE_TIMEOUT, "waited too long for its turn", 1000)
        start_queued(node, live)


def on_step(node: Node, deltas: list[node_pb2.TokenDelta]) -> None:
    batches: dict[Session, node_pb2.TokenBatch] = {}
    for delta in deltas:
        stream = node.streams.get(delta.request_id)
        if stream is None:
            continue
        delta.request_id = stream.submit.request_id
        stream.tokens = delta.prompt_tokens + delta.completion_tokens
        if delta.HasField("finish"):
            if stream.moving and delta.finish.kind == Finish.KIND_ABORTED and not stream.gone:
                after = departs(node, stream) or node.successors(stream.group_id)
                delta.finish.CopyFrom(Finish(kind=Finish.KIND_MOVED, successors=after))
            _forget(node, stream)
        elif delta.token_ids:
            hand_over(node, stream)
            stream.begun = True
        batches.setdefault(stream.session, node_pb2.TokenBatch()).deltas.append(delta)
    for session, batch in batches.items():
        session.send(node_pb2.AttachResponse(tokens=batch))


def _forget(node: Node, stream: Stream) -> None:
    node.streams.pop(stream.rid, None)
    node.by_request.pop((stream.session.number, stream.submit.request_id), None)
    live = node.groups.get(stream.group_id)
    if live is None:
        return
    live.waiting.pop(stream.rid, None)
    live.ledger.release(stream.rid, time.monotonic())
    refill(node)
    start_queued(node, live)


def finish(node: Node, stream: Stream, finish: node_pb2.Finish) -> None:
    _forget(node, stream)
    delta = node_pb2.TokenDelta(request_id=stream.submit.request_id, finish=finish)
    stream.session.send(node_pb2.AttachResponse(tokens=node_pb2.TokenBatch(deltas=[delta])))


def refuse_stream(node: Node, stream: Stream, reason: "node_pb2.Refused.Reason.ValueType", message: str, retry_after_ms: int = 0) -> None:
    _forget(node, stream)
    _refuse(node, stream.session, stream.submit.request_id, reason, message, stream.group_id, retry_after_ms)


def _refuse(
    node: Node,
    session: Session,
    request_id: str,
    reason: "node_pb2.Refused.Reason.ValueType",
    message: str,
    group_id: str = "",
    retry_after_ms: int = 0,
) -> None:
    successors = node.successors(group_id) if reason in (Refused.REASON_MOVED, Refused.REASON_DRAINING) else []
    refused = Refused(request_id=request_id, reason=reason, message=message, epoch=node.epoch, successors=successors)
    refused.retry_after_ms = retry_after_ms
    session.send(node_pb2.AttachResponse(refused=refused))
