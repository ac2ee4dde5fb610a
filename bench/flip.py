"""The gap of a flip TP1 -> TP2 and back, beside a stock restart and a zygote start, in one run on one machine.

usage: uv run python bench/flip.py [--quick] [--json FILE]

The gap is from the last token on A to the first on B of each stream, as the engine host sees it (no network, no HTTP): A's streams are
aborted, A parks, B wakes, every stream is submitted again as prompt + generated. B's own prefill of the same work is measured apart, on
an awake, idle B without cache. Every moved stream is compared, token for token, with an unmoved run.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineRequest, EngineSpec
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.stock import stock_server
from nitsum_sglang.warmup import warm_up
from nitsum_sglang.zygote_client import Zygote

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 96
MOVE_AFTER = 32


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


def prompts(streams: int, run: int) -> list[list[int]]:
    return [[3 + (31 * run + 7 * i + j * (i + 1)) % 900 for j in range(PROMPT_TOKENS)] for i in range(streams)]


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


def pss_mb(pid: int) -> dict[str, float]:
    with open(f"/proc/{pid}/smaps_rollup") as f:
        rows = dict(line.split(":", 1) for line in f if ":" in line and line.rstrip().endswith("kB"))
    private = sum(float(rows[k].split()[0]) for k in ("Private_Clean", "Private_Dirty"))
    return {"pss_mb": round(float(rows["Pss"].split()[0]) / 1024, 1), "private_mb": round(private / 1024, 1)}


def stock_restart_s(model: Path, folder: Path) -> float:
    """Kill to first token, bytecode compiled: what a TP change costs without resident engines."""
    with stock_server(model, folder):
        pass
    start = time.perf_counter()
    with stock_server(model, folder, tp_size=2) as url:
        body = {"input_ids": prompts(1, 0)[0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        httpx.post(url + "/generate", json=body, timeout=120).raise_for_status()
        return time.perf_counter() - start


async def measure(quick: bool) -> dict[str, Any]:
    rounds = 3 if quick else 10
    model = tiny_llama()
    out: dict[str, Any] = {
        "origin": "measured",
        "model": "tiny random Llama, fp32, CPU",
        "prompt_tokens": PROMPT_TOKENS,
        "moved_after_tokens": MOVE_AFTER,
        "machine": {"cpus": os.cpu_count(), "python": sys.version.split()[0], "platform": platform.machine()},
    }
    with tempfile.TemporaryDirectory(prefix="nitsum-b") as tmp:
        folder = Path(tmp)
        out["stock_restart_s"] = [round(stock_restart_s(model, folder), 2) for _ in range(1 if quick else 3)]
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
            for streams in (1, 8):
                gaps: list[float] = []
                firsts: list[float] = []
                floor: list[float] = []
                equal = True
                for i in range(rounds):
                    work = prompts(streams, i)
                    here, there = (a, b) if i % 2 == 0 else (b, a)
                    got, tokens = await flip(here, there, f"f{streams}-{i}-", work)
                    equal &= tokens == await alone(here, f"u{streams}-{i}-", work)
                    floor.append(await prefill_ms(there, f"p{streams}-{i}-", work, MOVE_AFTER))
                    gaps += got
                    firsts = firsts or got
                out[f"flip_{streams}"] = {
                    "gap_ms_p50": round(statistics.median(gaps), 1),
                    "gap_ms_max": round(max(gaps), 1),
                    "first_flip_ms_max": round(max(firsts), 1),
                    "own_prefill_ms_p50": round(statistics.median(floor), 1),
                    "ratio_to_own_prefill": round(statistics.median(gaps) / statistics.median(floor), 2),
                    "stock_restart_over_gap": round(statistics.median(out["stock_restart_s"]) * 1e3 / statistics.median(gaps)),
                    "text_equal": equal,
                }
            pids = {f"tp{tp} process {i}": pid for tp, e in engines.items() if e.info for i, pid in enumerate(e.info.pids)}
            out["memory"] = {name: pss_mb(pid) for name, pid in pids.items()}
        finally:
            await asyncio.gather(*(e.stop() for e in engines.values()))
            await zygote.stop()
    return out


def show(out: dict[str, Any]) -> None:
    table = Table(title=f"{out['model']}, prompt {out['prompt_tokens']} tokens, moved after {out['moved_after_tokens']} (measured)")
    for column in ("", "1 stream", "8 streams"):
        table.add_column(column)
    for key in out["flip_1"]:
        table.add_row(key, str(out["flip_1"][key]), str(out["flip_8"][key]))
    table.add_row("stock restart, s", str(out["stock_restart_s"]), "")
    table.add_row(
        "zygote start, s (TP1, TP2)", f"{out['zygote_start_tp1_s']}, {out['zygote_start_tp2_s']}", f"zygote itself {out['zygote_itself_s']}"
    )
    for name, row in out["memory"].items():
        table.add_row(f"memory of {name}", f"PSS {row['pss_mb']} MB", f"private {row['private_mb']} MB")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one stock restart")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    out = asyncio.run(measure(args.quick))
    show(out)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
