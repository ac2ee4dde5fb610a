"""A fake of the engine port: the next token is a hash of all tokens before it, so that moved and unmoved streams compare."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Sequence

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang.port import EngineEnded, EngineInfo, EngineRequest, EngineSpec, Limits, Timings


def next_token(prefix: Sequence[int]) -> int:
    return zlib.crc32(",".join(map(str, prefix)).encode()) % 1000


class FakeEngine:
    def __init__(self, spec: EngineSpec, step_s: float = 0.002) -> None:
        self.spec, self.step_s = spec, step_s
        self.wakes = True
        """False: `wake` does not return, and the engine is awake or not."""
        self.parks = True
        """False: `park` does not return."""
        self.starts = True
        """False: `start` ends the engine."""
        self.may_start = asyncio.Event()
        """`start` waits for it; set unless a test clears it."""
        self.may_start.set()
        self.lingers_s = 0.0
        """From its end to the end of its last process; until then it may hold its GPUs."""
        self.on_awake: Callable[[bool], None] = lambda awake: None
        """Told when it begins, or may begin, to hold its GPUs, and when it has let go of them."""
        self.awake = False
        self.limits, self.timings = Limits(), Timings()
        self._live: dict[str, tuple[list[int], int, int]] = {}
        self._steps: asyncio.Queue[list[node_pb2.TokenDelta] | None] = asyncio.Queue()
        self._loop: asyncio.Task[None] | None = None
        self._ended = ""

    async def start(self) -> EngineInfo:
        await self.may_start.wait()
        if not self.starts:
            self._end("it does not start")
        self._check()
        self._loop = asyncio.create_task(self._run())
        return EngineInfo(8192, 8000, ())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            deltas = [self._step(rid) for rid in list(self._live)] if self.awake else []
            if deltas:
                self._steps.put_nowait(deltas)

    def _step(self, rid: str) -> node_pb2.TokenDelta:
        tokens, prompt, limit = self._live[rid]
        tokens.append(next_token(tokens))
        delta = node_pb2.TokenDelta(request_id=rid, token_ids=tokens[-1:], prompt_tokens=prompt, completion_tokens=len(tokens) - prompt)
        if len(tokens) - prompt >= limit:
            delta.finish.kind = node_pb2.Finish.KIND_LENGTH
            del self._live[rid]
        return delta

    def _check(self) -> None:
        if self._ended:
            raise EngineEnded(self._ended)

    async def wake(self) -> None:
        self._check()
        if not self.awake:
            self.on_awake(True)
        self.awake = True
        while not self.wakes:
            await asyncio.sleep(self.step_s)
            self._check()
        await asyncio.sleep(0)
        self._check()

    async def park(self) -> None:
        self._check()
        for rid in list(self._live):
            self.abort(rid)
        while not self.parks:
            await asyncio.sleep(self.step_s)
            self._check()
        await asyncio.sleep(0)
        self._check()
        self._rest()

    def _rest(self) -> None:
        if self.awake:
            self.awake = False
            self.on_awake(False)

    def govern(self, limits: Limits) -> None:
        self.limits = limits

    def submit(self, request: EngineRequest) -> None:
        if self._ended:
            return  # steps() says so
        ids = list(request.submit.input_ids)
        prompt = len(ids) - request.submit.resume_k
        self._live[request.rid] = (ids, prompt, request.submit.sampling.max_new_tokens)

    def abort(self, rid: str) -> None:
        if self._live.pop(rid, None) is not None:
            finish = node_pb2.Finish(kind=node_pb2.Finish.KIND_ABORTED)
            self._steps.put_nowait([node_pb2.TokenDelta(request_id=rid, finish=finish)])

    async def steps(self) -> AsyncIterator[list[node_pb2.TokenDelta]]:
        while (step := await self._steps.get()) is not None:
            yield step
        if self._ended != "stopped":
            raise EngineEnded(self._ended)

    async def flush_cache(self) -> bool:
        return not self._live

    def crash(self) -> None:
        self._end("crashed")

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        self._live.clear()
        self._steps.put_nowait(None)
        if self._loop is not None:
            self._loop.cancel()

    async def stop(self) -> None:
        self._end("stopped")
        await asyncio.sleep(self.lingers_s)
        self._rest()
