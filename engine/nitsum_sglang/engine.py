"""The real engine behind `port.Engine`: SGLang's schedulers alone, forked by a zygote, spoken to over their own sockets.

Tokens come straight from the schedulers (one message a step), requests go through the engine's leader, which knows SGLang's structs.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang import remains, seam, wire
from nitsum_sglang.port import EngineEnded, EngineInfo, EngineRequest, EngineSpec, Limits, Timings
from nitsum_sglang.zygote_client import Child, Zygote, ZygoteEnded, log_tail

zmq: Any = importlib.import_module("zmq")  # its stubs miss what it exports
zmq_asyncio: Any = importlib.import_module("zmq.asyncio")

START_TIMEOUT_S = 600.0
"""A large checkpoint from a cold disk."""
WAKE_TIMEOUT_S = 30.0
EMPTY_TIMEOUT_S = 10.0
"""From abort to an empty engine: one step, however long its batch; a stuck one is ended."""
ABORT_REPEAT_S = 0.05
KV_MAX_BYTES = 1 << 30
STEPS_BUFFERED_MAX = 4096


class SchedulerEngine:
    def __init__(self, spec: EngineSpec, zygote: Zygote, kv_max_bytes: int = KV_MAX_BYTES) -> None:
        self.spec, self.zygote, self.kv_max_bytes = spec, zygote, kv_max_bytes
        self.addresses = seam.addresses(spec.state_dir)
        self.log_path = Path(spec.state_dir, "engine.log")
        self.parked = True
        self.limits, self.timings = Limits(), Timings()
        self.child: Child | None = None
        self.info: EngineInfo | None = None
        self._live: set[str] = set()
        self._aborting: set[str] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._steps: asyncio.Queue[list[node_pb2.TokenDelta] | None] = asyncio.Queue(STEPS_BUFFERED_MAX)
        self._confirmations: dict[str, asyncio.Future[str]] = {}
        self._flushes: deque[asyncio.Future[bool]] = deque()
        self._nonce = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._context: Any = None
        self._ended: str | None = None
        self._stopping = False
        self._turn = asyncio.Lock()  # wake, park and flush, one after another

    # Start and stop

    async def start(self) -> EngineInfo:
        remains.prepare(self.spec.state_dir)
        self._context = zmq_asyncio.Context(1)
        self._tokens, self._replies = self._bound(zmq.PULL, "tokens"), self._bound(zmq.PULL, "replies")
        self._leader = self._bound(zmq.PAIR, "leader")
        self._leader_now = zmq.Socket.shadow(self._leader.underlying)  # the same socket, sent to without a task
        spec = dataclasses.asdict(self.spec) | {"kv_max_bytes": self.kv_max_bytes}
        try:
            self.child = await self.zygote.fork(
                "nitsum_sglang.leader:main",
                {"spec": spec, "forked": self.zygote.forks},
                log_path=self.log_path,
                title=f"nitsum-engine: {self.spec.engine_id}",
            )
            self.info = await self._ready(self.child)
        except (ZygoteEnded, ValueError, TimeoutError) as error:
            await self._end(str(error) or type(error).__name__)
            await self.stop()
            raise EngineEnded(self._ended) from error
        except BaseException:
            await self.stop()
            raise
        return self.info

    def _bound(self, kind: int, name: str) -> Any:
        s = self._context.socket(kind)
        s.setsockopt(zmq.LINGER, 0)
        s.setsockopt(zmq.SNDHWM, 0)
        s.setsockopt(zmq.RCVHWM, 0)  # bounded by what runs on the engine
        s.bind(self.addresses[name])
        return s

    async def _ready(self, child: Child) -> EngineInfo:
        first = asyncio.ensure_future(self._leader.recv())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.wait((first, child.exited), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not first.done():
                first.cancel()
        if child.exited.done():
            why = remains.error(self.spec.state_dir)
            raise ValueError(f"engine {self.spec.engine_id} did not start: {why}\n{log_tail(self.log_path)}")
        ready = json.loads(first.result())["ready"]
        self._fields: dict[str, list[str]] = ready["fields"]
        self._decode = wire.token_decoder(self._fields["BatchTokenIDOutput"])
        self._tasks = [asyncio.create_task(c) for c in (self._read_tokens(), self._read_replies(), self._read_leader(), self._watch(child))]
        return EngineInfo(ready["max_total_tokens"], ready["max_req_input_len"], tuple(ready["pids"]))

    async def _watch(self, child: Child) -> None:
        status = await asyncio.shield(child.exited)
        await self._end(f"engine {self.spec.engine_id} ended (wait status {status}); its log ends: {log_tail(self.log_path)}")

    async def _end(self, reason: str) -> None:
        """Everything that waits on this engine learns that it ended."""
        if self._ended is not None:
            return
        self._ended = reason
        self._live.clear()
        self._aborting.clear()
        self._empty.set()
        waiters: list[asyncio.Future[Any]] = [*self._confirmations.values(), *self._flushes]
        for waiting in waiters:
            if not waiting.done():
                waiting.set_exception(EngineEnded(reason))
                waiting.exception()  # seen: whoever waits gets it too
        with contextlib.suppress(asyncio.QueueFull):
            self._steps.put_nowait(None)

    async def stop(self) -> None:
        self._stopping = True
        if self.child is not None:
            await self.child.kill()
            await self._ranks_gone()
        await self._end("stopped")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None
        remains.clear(self.spec.state_dir)

    async def _ranks_gone(self, timeout_s: float = 10.0) -> None:
        """Ranks die with the leader (PDEATHSIG); what survives that is killed by number, after a check that it is ours."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while remains.ranks(self.spec.state_dir) and loop.time() < deadline:  # noqa: ASYNC110  not our children: nothing to wait on
            await asyncio.sleep(0.01)
        remains.kill(self.spec.state_dir)

    # Commands

    async def wake(self) -> None:
        async with self._turn:
            self._check()
            if self.parked:
                await self._confirmed(seam.CONTINUE, "wake")
                self.parked = False

    async def park(self) -> None:
        async with self._turn:
            self._check()
            if self.parked:
                return
            await self._emptied()
            await self._confirmed(seam.PAUSE, "park")
            self.parked = True

    async def _emptied(self) -> None:
        """Aborts until nothing is left: a request on its way escapes the first one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + EMPTY_TIMEOUT_S
        while self._live:
            if loop.time() > deadline:
                await self._kill(f"engine {self.spec.engine_id} did not end {len(self._live)} requests within {EMPTY_TIMEOUT_S:.0f} s")
            self._aborting |= self._live
            self._tell(seam.ABORT_ALL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), ABORT_REPEAT_S)
        self._check()

    def govern(self, limits: Limits) -> None:
        if limits != self.limits:
            self.limits = limits
            self._tell(seam.GOVERN, str(limits.prefill_tokens_per_step).encode())

    async def _confirmed(self, command: bytes, name: str) -> None:
        self._nonce += 1
        rid = f"{name}.{self._nonce}"
        confirmation = self._confirmations[rid] = asyncio.get_running_loop().create_future()
        try:
            self._tell(command, rid.encode())
            await asyncio.wait_for(confirmation, WAKE_TIMEOUT_S)
        except TimeoutError:
            await self._kill(f"engine {self.spec.engine_id} did not confirm {name} within {WAKE_TIMEOUT_S:.0f} s")
        finally:
            del self._confirmations[rid]

    async def _kill(self, reason: str) -> None:
        """Ends an engine that does not answer; what hangs while it is awake would hold its GPUs."""
        await self._end(reason)
        if self.child is not None:
            await self.child.kill()
        raise EngineEnded(reason)

    def submit(self, request: EngineRequest) -> None:
        if self._ended is not None:
            return  # steps() says so
        self._live.add(request.rid)
        self._empty.clear()
        self._tell(seam.SUBMIT, request.rid.encode(), str(request.priority).encode(), request.submit.SerializeToString())

    def abort(self, rid: str) -> None:
        if rid in self._live:
            self._aborting.add(rid)
            self._tell(seam.ABORT, rid.encode())

    async def flush_cache(self) -> bool:
        async with self._turn:
            self._check()
            if self._live:
                return False
            flushed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._flushes.append(flushed)
            self._tell(seam.FLUSH)
            try:
                return await asyncio.wait_for(flushed, WAKE_TIMEOUT_S)
            except TimeoutError:
                return False

    def _check(self) -> None:
        if self._ended is not None:
            raise EngineEnded(self._ended)

    def _tell(self, *frame: bytes) -> None:
        """Never blocks: the socket has no high-water mark, the host's ledger bounds what is sent."""
        if self._context is not None:
            self._leader_now.send_multipart(frame, zmq.NOBLOCK)

    # What comes back

    async def steps(self) -> AsyncIterator[list[node_pb2.TokenDelta]]:
        while True:
            if self._ended is not None and self._steps.empty():
                step = None
            else:
                step = await self._steps.get()
            if step is not None:
                yield step
            elif self._stopping:
                return
            else:
                raise EngineEnded(self._ended)

    async def _read_tokens(self) -> None:
        while True:
            batch = self._decode(await self._tokens.recv())
            await self._put(wire.deltas_of(batch, self._live.__contains__, self._aborting.__contains__))

    async def _read_replies(self) -> None:
        while True:
            name, reply = wire.reply_of(await self._replies.recv(), self._fields)
            rid = str(reply.get("rid") or "")
            if rid == seam.STEPS:
                self.timings = Timings(self.timings.serial + 1, wire.timings_of(str(reply.get("message"))))
            elif name == "AbortReq" and rid in self._live:  # it was queued
                finish = wire.finish_of(reply.get("finished_reason") or {"type": "abort"}, rid in self._aborting)
                await self._put([node_pb2.TokenDelta(request_id=rid, finish=finish)])
            elif name == "FlushCacheReqOutput" and rid in self._confirmations:
                if not (confirmation := self._confirmations[rid]).done():
                    confirmation.set_result(str(reply["message"]))
            elif name == "FlushCacheReqOutput" and self._flushes and not (flushed := self._flushes.popleft()).done():
                flushed.set_result(bool(reply["success"]))

    async def _read_leader(self) -> None:
        while True:
            refused = json.loads(await self._leader.recv())
            if refused["rid"] in self._live:
                finish = wire.error(refused["error"], refused["status"])
                await self._put([node_pb2.TokenDelta(request_id=refused["rid"], finish=finish)])

    async def _put(self, deltas: list[node_pb2.TokenDelta]) -> None:
        for delta in deltas:
            if delta.HasField("finish"):
                self._live.discard(delta.request_id)
                self._aborting.discard(delta.request_id)
        if deltas:
            await self._steps.put(deltas)
        if not self._live:
            self._empty.set()
