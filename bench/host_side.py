"""A flip as the engine host sees it: no network, no HTTP. Here B's own prefill is measured, the floor of every gap.

A's streams are aborted, A parks, B wakes, every stream is submitted again as prompt + generated. B's prefill of the same work is measured
apart, on an awake, idle B without cache. Every moved stream is compared, token for token, with an unmoved run.
"""

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from work import MOVE_AFTER, OUTPUT_TOKENS, prompts

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineRequest, EngineSpec
from nitsum_sglang.warmup import warm_up
from nitsum_sglang.zygote_client import Zygote


class Reader:
    """Collects what an engine says, with the time of each token."""

    def __init__(self, engine: SchedulerEngine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.times: dict[str, list[float]] = {}
        self.finished: dict[str, int] = {}
        self.changed = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for step in self.engine.steps():
            now = time.perf_counter()
            for d in step:
                self.tokens.setdefault(d.request_id, []).extend(d.token_ids)
                if d.token_ids:
                    self.times.setdefault(d.request_id, []).append(now)
                if d.HasField("finish"):
                    self.finished[d.request_id] = d.finish.kind
            self.changed.set()

    async def until(self, test: Any, timeout_s: float = 120) -> None:
        async with asyncio.timeout(timeout_s):
            while not test():
                self.changed.clear()
                await self.changed.wait()


def request(rid: str, ids: list[int], resume_k: int = 0, salt: str = "") -> EngineRequest:
    sampling = node_pb2.Sampling(max_new_tokens=OUTPUT_TOKENS, temperature=1.0, top_k=1, ignore_eos=True, skip_special_tokens=True)
    return EngineRequest(rid, node_pb2.Submit(input_ids=ids, resume_k=resume_k, sampling=sampling, cache_salt=salt))


async def alone(reader: Reader, name: str, work: list[list[int]]) -> list[list[int]]:
    """An unmoved run on one engine."""
    await reader.engine.wake()
    rids = [f"{name}{i}." for i in range(len(work))]
    for rid, ids in zip(rids, work, strict=True):
        reader.engine.submit(request(rid, ids))
    await reader.until(lambda: set(rids) <= set(reader.finished))
    await reader.engine.flush_cache()
    await reader.engine.park()
    return [reader.tokens[rid] for rid in rids]


async def flip(a: Reader, b: Reader, name: str, work: list[list[int]]) -> tuple[list[float], list[list[int]]]:
    """(gap of each stream in ms, tokens of each stream)."""
    await a.engine.wake()
    rids = [f"{name}{i}." for i in range(len(work))]
    for rid, ids in zip(rids, work, strict=True):
        a.engine.submit(request(rid, ids))
    await a.until(lambda: all(len(a.tokens.get(r, [])) >= MOVE_AFTER for r in rids))
    for rid in rids:
        a.engine.abort(rid)
    await a.until(lambda: set(rids) <= set(a.finished))
    await a.engine.park()
    await b.engine.wake()
    for rid, ids in zip(rids, work, strict=True):
        b.engine.submit(request(rid, [*ids, *a.tokens[rid]], resume_k=len(a.tokens[rid])))
    await b.until(lambda: set(rids) <= set(b.finished))
    gaps = [(b.times[r][0] - a.times[r][-1]) * 1e3 for r in rids]
    await b.engine.flush_cache()
    await b.engine.park()
    return gaps, [a.tokens[r] + b.tokens[r] for r in rids]


async def prefill_ms(b: Reader, name: str, work: list[list[int]], generated: int) -> float:
    """Submission to first token of the slowest stream: B's own prefill of what a flip would bring, idle and uncached."""
    await b.engine.wake()
    rids = [f"{name}{i}." for i in range(len(work))]
    start = time.perf_counter()
    for rid, ids in zip(rids, work, strict=True):
        b.engine.submit(request(rid, [*ids, *range(3, 3 + generated)], salt=name))
    await b.until(lambda: all(b.times.get(r) for r in rids))
    took = max(b.times[r][0] for r in rids) - start
    await b.until(lambda: set(rids) <= set(b.finished))
    await b.engine.flush_cache()
    await b.engine.park()
    return took * 1e3


async def measure(model: Path, folder: Path, rounds: int, moved_tokens: dict[int, int]) -> dict[str, Any]:
    """`moved_tokens`: by number of streams, output tokens of each that B prefills with the prompt in `own_prefill_ms_p50`."""
    out: dict[str, Any] = {}
    zygote = Zygote(folder / "z.sock", folder / "zygote.log")
    start = time.perf_counter()
    await zygote.start()
    out["zygote_itself_s"] = round(time.perf_counter() - start, 2)
    engines = {
        tp: SchedulerEngine(EngineSpec(f"tp{tp}", str(model), "r0", tp, ("g0", "g1")[:tp], str(folder / f"tp{tp}")), zygote)
        for tp in (1, 2)
    }
    try:
        for tp, engine in engines.items():
            start = time.perf_counter()
            await engine.start()
            out[f"zygote_start_tp{tp}_s"] = round(time.perf_counter() - start, 2)
            await warm_up(engine)
        a, b = Reader(engines[1]), Reader(engines[2])
        for streams, moved in moved_tokens.items():
            out[f"flip_{streams}"] = await _rounds(a, b, streams, rounds, moved)
    finally:
        await asyncio.gather(*(e.stop() for e in engines.values()))
        await zygote.stop()
    return out


async def _rounds(a: Reader, b: Reader, streams: int, rounds: int, moved: int) -> dict[str, Any]:
    gaps: list[float] = []
    first = 0.0
    floor: list[float] = []
    equal = True
    for i in range(rounds):
        work = prompts(streams, i)
        here, there = (a, b) if i % 2 == 0 else (b, a)
        got, tokens = await flip(here, there, f"f{streams}-{i}-", work)
        equal &= tokens == await alone(here, f"u{streams}-{i}-", work)
        floor.append(await prefill_ms(there, f"p{streams}-{i}-", work, moved))
        gaps += got
        first = first or max(got)
    return {
        "gap_ms_p50": round(statistics.median(gaps), 1),
        "gap_ms_max": round(max(gaps), 1),
        "first_flip_ms_max": round(first, 1),
        "own_prefill_ms_p50": round(statistics.median(floor), 1),
        "text_equal": equal,
    }
