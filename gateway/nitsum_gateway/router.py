"""Our router, in the place of SGLang's scheduler behind one front: what the tokenizer sends goes to engine hosts, their tokens go to the
detokenizer. A request's tokens are kept here until its end, so any engine or host may die: the stream goes on elsewhere.

A process of its own, forked by the front; imports gRPC only after that fork.
"""

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nitsum import routing
from nitsum.affinity import Affinity
from nitsum.routing import AdmissionClass
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_gateway import control
from nitsum_gateway.allowed import TIER_KEY
from nitsum_gateway.demand import Demand
from nitsum_gateway.emit import Emitter, Row, failure, finish_of
from nitsum_gateway.sampling import logprobs_of, sampling_of

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 8192
ADMISSIONS = {
    AdmissionClass.FEASIBLE: types_pb2.ADMISSION_FEASIBLE,
    AdmissionClass.BEST_EFFORT: types_pb2.ADMISSION_BEST_EFFORT,
    AdmissionClass.BACKGROUND: types_pb2.ADMISSION_BACKGROUND,
}
ELSEWHERE = (
    node_pb2.Refused.REASON_MOVED,
    node_pb2.Refused.REASON_UNKNOWN_GROUP,
    node_pb2.Refused.REASON_DRAINING,
    node_pb2.Refused.REASON_CONTRACT_VERSION,
)
NORMAL = (node_pb2.Finish.KIND_STOP, node_pb2.Finish.KIND_LENGTH)
CLIENTS_FAULT = (node_pb2.Refused.REASON_TOO_LONG, node_pb2.Refused.REASON_INVALID)


@dataclass
class Live:
    """A request in flight. Times are seconds of time.monotonic()."""

    request: Any
    number: int
    tier: types_pb2.Tier
    stream: routing.Stream
    sampling: node_pb2.Sampling
    logprobs: node_pb2.Logprobs | None
    arrived: float
    blocks: tuple[bytes, ...]
    """Digests of the prompt's."""
    out: list[int] = field(default_factory=list)
    first_at: float = 0.0
    last_at: float = 0.0
    emitted: bool = False
    cached_tokens: int | None = None
    reasoning_tokens: int = 0

    def node_rid(self, hop: int) -> str:
        return f"{self.number}.{hop}."


class Router:
    """`lines`: agent id -> line to its node (`NodeLine`, or a test's)."""

    def __init__(self, emitter: Emitter, context_length: int) -> None:
        self.emitter, self.context_length = emitter, context_length
        self.lines: dict[str, Any] = {}
        self.tiers: list[types_pb2.Tier] = []
        self.live: dict[str, Live] = {}
        self.by_hop: dict[str, tuple[Live, int, Any]] = {}
        self.demand = Demand()
        self.unready_reason = ""
        self._routes = routing.Routes()
        self._affinity = Affinity(os.urandom(32))
        self._seen: dict[str, tuple[Any, int, list[routing.Key]]] = {}
        """By agent id: line, its `changes` when it was looked at, its groups in `_routes`."""
        self._number = 0
        self._rows: list[Row] = []

    # From SGLang's front

    def submit(self, request: Any) -> None:
        now = time.monotonic()
        tier = self._tier((request.sampling_params.custom_params or {}).get(TIER_KEY))
        background = not tier.ttft_ms and not tier.tpot_ms
        self._number += 1
        stream = routing.Stream(tier.name, background, now)
        sampling, logprobs = sampling_of(request, self.context_length), logprobs_of(request)  # raise what ends this request alone
        blocks = self._affinity.digests(request.input_ids, request.cache_salt or "")
        live = Live(request, self._number, tier, stream, sampling, logprobs, now, blocks)
        self.demand.arrived(tier.name, len(request.input_ids))
        self.live[request.rid] = live
        if request.sampling_params.max_new_tokens == 0 and not request.return_logprob:
            return self._end(live, Row(request, [], True, 0, {"type": "length", "length": 0}))  # n > 1 begins so
        if len(self.live) > IN_FLIGHT_MAX:
            return self._carry_out(live, [routing.Fail(429, f"{IN_FLIGHT_MAX} requests are in flight; try again later", 1000)])
        if self.lines and all(line.gone for line in self.lines.values()):
            return self._carry_out(live, [routing.Fail(503, "no node of this pool answers", 1000)])
        self._look_up(live)
        self._carry_out(live, stream.start(self.view(), now))

    def refuse(self, request: Any, status: int, message: str) -> None:
        """A request that never became a stream."""
        self.emitter.emit([Row(request, [], True, 0, failure(status, message))])

    def abort(self, rid: str, everything: bool = False) -> None:
        for live in [v for k, v in self.live.items() if everything or k == rid]:
            self._carry_out(live, live.stream.handle(routing.ClientGone(), (), time.monotonic()))
            self.demand.left(live.tier.name)
            self._forget(live)
            row = Row(live.request, [], not live.emitted, len(live.out), {"type": "abort", "message": "the client went away"})
            self.emitter.emit([row])

    def running(self) -> Iterator[tuple[str, int]]:
        """Tier of each stream that has tokens, and how many."""
        return ((live.tier.name, len(live.out)) for live in self.live.values() if live.out)

    # From nodes

    def on_frame(self, line: Any, frame: node_pb2.AttachResponse) -> None:
        what = frame.WhichOneof("frame")
        if what == "tokens":
            for delta in frame.tokens.deltas:
                self._delta(line, delta)
            rows, self._rows = self._rows, []
            if rows:
                self.emitter.emit(rows)
        elif what == "refused":
            self._refused(line, frame.refused)

    def on_break(self, line: Any) -> None:
        """Hits the streams whose last submission went over this very line: its successor to the same node may carry some already."""
        hit = [(live, hop) for live, hop, over in self.by_hop.values() if over is line and live.stream.group and hop == live.stream.hop]
        for live, hop in hit:
            self.demand.moved(live.tier.name)
            self._feed(live, routing.NodeLost(hop))

    def _delta(self, line: Any, delta: node_pb2.TokenDelta) -> None:
        live, hop, _ = self.by_hop.get(delta.request_id, (None, 0, None))
        if live is None or hop != live.stream.hop:
            return
        now = time.monotonic()
        if live.cached_tokens is None:  # later hops find the KV of this very request: not the client's business
            live.cached_tokens = delta.cached_tokens
        live.reasoning_tokens = delta.reasoning_tokens
        kind = delta.finish.kind
        normal = kind in NORMAL
        if delta.token_ids or normal:
            self._tokens(live, hop, delta, now)
        if not kind:
            return
        if normal:
            return self._feed(live, routing.Finished(hop))
        if kind == node_pb2.Finish.KIND_ERROR:
            status = delta.finish.status_code or 500
            return self._feed(live, routing.Refused(hop, fatal=delta.finish.message or "the engine refused the request", status=status))
        self.demand.moved(live.tier.name)
        if kind == node_pb2.Finish.KIND_ENGINE_CRASHED:
            return self._feed(live, routing.Crashed(hop))
        self._feed(live, self._moved(line, hop, list(delta.finish.successors)))

    def _tokens(self, live: Live, hop: int, delta: node_pb2.TokenDelta, now: float) -> None:
        request, ids = live.request, list(delta.token_ids)
        scoring = request.sampling_params.max_new_tokens == 0
        if scoring:  # the one token that the engine had to make is not wanted
            ids = []
        for c in live.stream.handle(routing.Tokens(hop, tuple(ids)), (), now):
            assert isinstance(c, routing.Deliver)
        fresh = not live.out
        live.out += ids
        live.first_at, live.last_at = live.first_at or now, now
        normal = delta.finish.kind in NORMAL  # any other end is not the request's: it goes on, or fails
        finish = finish_of(delta.finish, len(live.out)) if normal else None
        row = Row(request, ids, not live.emitted, len(live.out), finish, live.cached_tokens or 0, live.reasoning_tokens)
        if request.return_logprob:
            row.output_logprobs = None if scoring else delta.output_logprobs
            row.input_logprobs = delta.input_logprobs if fresh else None
        live.emitted = True
        self._rows.append(row)

    def _refused(self, line: Any, refused: node_pb2.Refused) -> None:
        live, hop, _ = self.by_hop.get(refused.request_id, (None, 0, None))
        if live is None:
            return
        if refused.reason in ELSEWHERE:
            return self._feed(live, self._moved(line, hop, list(refused.successors)))
        fatal = (refused.message or "the node refused the request") if refused.reason in CLIENTS_FAULT else ""
        if refused.reason == node_pb2.Refused.REASON_TOO_LONG:
            fatal += " [context length]"  # the dispatcher makes a code of it
        self._feed(live, routing.Refused(hop, refused.retry_after_ms, fatal))

    @staticmethod
    def _moved(line: Any, hop: int, successors: list[node_pb2.Successor]) -> routing.Moved:
        line.learn(successors)
        return routing.Moved(hop, tuple(((line.agent_id, s.group_id), s.epoch) for s in successors))

    # Carrying out

    def view(self) -> routing.Routes:
        """All groups as their nodes last said. Only lines with news are looked at, for this is asked with each request."""
        for agent_id in [a for a in self._seen if a not in self.lines]:
            self._look(agent_id, self._seen[agent_id][0], [])
        for agent_id, line in self.lines.items():
            seen = self._seen.get(agent_id)
            if seen is None or seen[0] is not line or seen[1] != line.changes:
                self._look(agent_id, line, line.groups())
        return self._routes

    def _look(self, agent_id: str, line: Any, groups: list[routing.GroupView]) -> None:
        *_, old = self._seen.pop(agent_id, (None, 0, []))
        for key in set(old).difference(g.key for g in groups):
            self._routes.remove(key)
        for g in groups:
            self._routes.put(g)
        if agent_id in self.lines:
            self._seen[agent_id] = line, line.changes, [g.key for g in groups]

    def _look_up(self, live: Live) -> None:
        live.stream.warm = self._affinity.warm(live.blocks, len(live.request.input_ids))

    def _feed(self, live: Live, event: routing.Event) -> None:
        if isinstance(event, routing.Moved | routing.Refused | routing.Crashed | routing.NodeLost):
            self.by_hop.pop(live.node_rid(event.hop), None)  # over: what still comes of it is nobody's
            self._look_up(live)
        self._carry_out(live, live.stream.handle(event, self.view(), time.monotonic()))

    def _carry_out(self, live: Live, commands: list[routing.Command]) -> None:
        todo = deque(commands)
        while todo:
            c = todo.popleft()
            if isinstance(c, routing.Submit):
                if not self._submit(live, c):
                    todo.extend(live.stream.handle(routing.NodeLost(c.hop), self.view(), time.monotonic()))
            elif isinstance(c, routing.Retry):
                asyncio.get_running_loop().call_later(c.after_s, self._retry, live)
            elif isinstance(c, routing.Abort):
                if line := self.lines.get(c.group[0]):
                    line.send(node_pb2.AttachRequest(abort=node_pb2.Abort(request_id=live.node_rid(c.hop))))
            elif isinstance(c, routing.Fail):
                self._fail(live, c)
            elif isinstance(c, routing.Done):
                tokens = len(live.out)
                tpot_ms = (live.last_at - live.first_at) * 1e3 / (tokens - 1) if tokens > 1 else 0.0
                self.demand.finished(live.tier, tokens, (live.first_at - live.arrived) * 1e3, tpot_ms)
                self._forget(live)

    def _submit(self, live: Live, c: routing.Submit) -> bool:
        line = self.lines.get(c.group[0])
        assert c.resume == len(live.out), (c.resume, len(live.out))
        for old in [k for k in (live.node_rid(h) for h in range(max(c.hop - 2, 0), c.hop)) if k in self.by_hop]:
            del self.by_hop[old]
        if line is None:
            return False
        logprobs = live.logprobs
        if logprobs is not None and c.resume:
            logprobs = node_pb2.Logprobs(start=-1, top=logprobs.top, token_ids=logprobs.token_ids)
        submit = node_pb2.Submit(
            request_id=live.node_rid(c.hop),
            group_id=c.group[1],
            epoch=c.epoch,
            tier=live.tier.name,
            admission=ADMISSIONS[c.admission],
            input_ids=[*live.request.input_ids, *live.out],
            resume_k=c.resume,
            sampling=live.sampling,
            logprobs=logprobs,
            cache_salt=live.request.cache_salt or "",
            suspect=c.suspect,
            age_ms=min(int((time.monotonic() - live.arrived) * 1e3), 1 << 31),
            follows=live.node_rid(c.hop - 1) if c.hop > 1 else "",
        )
        self.by_hop[submit.request_id] = live, c.hop, line
        sent = bool(line.send(node_pb2.AttachRequest(submit=submit)))
        if sent:
            self._routes.submitted(c.group)
            group = self._routes.get(c.group)
            if group is None or group.role.suits(False):  # what only decodes gets no prompts, so it need not be known
                self._affinity.ran(live.blocks, c.group, c.epoch)
        return sent

    def _retry(self, live: Live) -> None:
        if self.live.get(live.request.rid) is live:
            self._feed(live, routing.Retried())

    def _fail(self, live: Live, c: routing.Fail) -> None:
        message = c.message
        if c.status == 503:
            reasons = [r for r in (self.unready_reason, *(f"{n.agent_id}: {n.problem}" for n in self.lines.values() if n.problem)) if r]
            message += f" ({'; '.join(reasons)[:500]})" if reasons else ""
        if c.retry_after_ms:
            message += f" [retry after {c.retry_after_ms} ms]"
        self.demand.refused(live.tier.name, c.status)
        self._forget(live)
        self._flush_before(live)
        self.emitter.emit([Row(live.request, [], not live.emitted, len(live.out), failure(c.status, message))])

    def _flush_before(self, live: Live) -> None:
        """Tokens of this very step go out before its end."""
        rows, self._rows = self._rows, []
        if rows:
            self.emitter.emit(rows)

    def _end(self, live: Live, row: Row) -> None:
        live.stream.ended = True
        self.demand.left(live.tier.name)
        self._forget(live)
        self.emitter.emit([row])

    def _forget(self, live: Live) -> None:
        if self.live.get(live.request.rid) is live:
            del self.live[live.request.rid]
        for hop in range(max(live.stream.hop - 2, 0), live.stream.hop + 1):
            self.by_hop.pop(live.node_rid(hop), None)

    def _tier(self, name: str | None) -> types_pb2.Tier:
        for t in self.tiers:
            if t.name == name:
                return t
        return next((t for t in self.tiers if t.is_default), self.tiers[0] if self.tiers else types_pb2.Tier(name="default"))


def run_router(server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, pp_rank: int, dp_rank: int | None, pipe_writer: Any) -> None:
    """Has the signature of sglang.srt.managers.scheduler.run_scheduler_process."""
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s router %(levelname)s %(message)s", force=True)
    asyncio.run(_main(server_args, port_args, pipe_writer, json.loads(os.environ["NITSUM_FRONT"])))


async def _main(server_args: Any, port_args: Any, pipe_writer: Any, settings: dict[str, Any]) -> None:
    import importlib

    import msgspec
    from sglang.srt.managers import io_struct as io
    from sglang.srt.utils.network import get_zmq_socket

    from nitsum_gateway.attach import attach

    zmq: Any = importlib.import_module("zmq")
    zmq_asyncio: Any = importlib.import_module("zmq.asyncio")
    rx = get_zmq_socket(zmq_asyncio.Context(1), zmq.PULL, port_args.scheduler_input_ipc_name, False)
    plain = zmq.Context(1)
    detokenizer = get_zmq_socket(plain, zmq.PUSH, port_args.detokenizer_ipc_name, False)
    tokenizer = get_zmq_socket(plain, zmq.PUSH, port_args.tokenizer_ipc_name, False)
    fields = msgspec.structs.fields
    emitter = Emitter(io, list(fields(io.BatchTokenIDOutput)), lambda m: io.sock_send(detokenizer, m))
    router = Router(emitter, int(settings["context_length"]))
    attached = asyncio.create_task(attach(router, settings))
    attached.add_done_callback(lambda t: t.cancelled() or os._exit(1))  # without routes there is nothing to do here
    pipe_writer.send(
        {"status": "ready", "max_total_num_tokens": 1 << 30, "max_req_input_len": int(settings["context_length"]), "startup_time": {}}
    )
    while True:
        message = await io.async_sock_recv(rx)
        try:
            _handle(io, fields, router, tokenizer, message)
        except Exception:
            log.exception("router: %s", type(message).__name__)


def _handle(io: Any, fields: Any, router: Router, tokenizer: Any, message: Any) -> None:
    if isinstance(message, io.AbortReq):
        router.abort(message.rid, message.abort_all)
    elif isinstance(message, (io.BatchTokenizedGenerateReqInput, io.TokenizedGenerateReqInput)):
        for request in getattr(message, "batch", None) or [message]:
            try:
                router.submit(request)
            except (ValueError, TypeError, OverflowError) as error:  # a number that no field of the node port takes
                router.refuse(request, 400, f"a parameter is out of range: {error}")
    elif isinstance(message, (io.BatchTokenizedEmbeddingReqInput, io.TokenizedEmbeddingReqInput)):
        for request in getattr(message, "batch", None) or [message]:
            refusal = failure(400, "this pool only generates")
            io.sock_send(tokenizer, io.AbortReq(rid=request.rid, http_worker_ipc=request.http_worker_ipc, finished_reason=refusal))
    elif type(message).__name__ == "ShutdownReq":
        os._exit(0)
    elif (reply := control.reply_to(io, fields, message)) is not None:
        io.sock_send(tokenizer, reply)
