"""How well the simulator foretells a real engine: a short trace sent to stock SGLang (CPU, TP1), and the same requests simulated with
a profile measured on that very engine just before and after. Per request: |predicted - measured| / measured of TTFT and of TPOT.

usage: uv run python bench/fidelity.py [--quick] [--model tiny|smollm2] [--json FILE]
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nitsum.perf.profile import Profile
from nitsum.pool import Pool, Tier
from nitsum.sim import arrivals, hardware, workload
from nitsum.sim.arrivals import Traffic
from nitsum.sim.engine import EngineLimits
from nitsum.sim.fleet import Fleet
from nitsum.sim.policies import registry
from nitsum.sim.result import Outcome
from nitsum_cli import measure
from nitsum_sglang.testing.models import smollm2, tiny_llama
from nitsum_sglang.testing.stock import stock_server

WANTED = 0.15
START_S = 600.0


@dataclass(frozen=True)
class Spec:
    """Bursty on purpose: some requests prefill alone, some wait, some decode beside others. About half of what two cores bear."""

    model: Callable[[], Path]
    rate: float
    prompt: float
    output: float
    slice_s: int
    points: measure.Points


SPECS = {
    "tiny": Spec(tiny_llama, 2.5, 250, 60, 20, measure.Points((16, 64, 256, 1024), (0,), (1, 2, 4, 8), (64, 512), 3)),
    "smollm2": Spec(smollm2, 0.25, 150, 30, 40, measure.Points((16, 64, 256, 768), (0,), (1, 2, 4), (64, 512), 2)),
}


@dataclass(frozen=True)
class Pair:
    """One request. Milliseconds; TPOT None: one token."""

    slice: int
    prompt: int
    output: int
    measured_ttft: float
    predicted_ttft: float
    measured_tpot: float | None
    predicted_tpot: float | None


def traffic(name: str, seconds: int, seed: int, context: int) -> Traffic:
    spec = SPECS[name]
    source = {"arrivals": {"gamma": {"cv": 1.5}}, "prompt": {"mean": spec.prompt, "cv": 1}, "output": {"mean": spec.output, "cv": 0.7}}
    stream = {"tier": "t", "synthetic": source, "rate": spec.rate, "max_tokens": 256}
    return arrivals.build(workload.parse({"duration": f"{seconds}s", "streams": [stream]}), lambda path: (), seed, context_length=context)


async def replay(url: str, requests: Traffic, seed: int) -> list[tuple[float, float | None]]:
    """(TTFT, TPOT) of each, in ms, as a client sees them. No two prompts share a prefix."""
    engine = measure.Engine(url, "", seed)
    prompts = [engine.prompt(r.prompt) for r in requests.requests]
    began = time.perf_counter() + 0.5

    async def one(i: int) -> tuple[float, float | None]:
        r = requests.requests[i]
        await asyncio.sleep(max(began + r.arrived - time.perf_counter(), 0))
        sent = time.perf_counter()
        seen = await engine.stream(prompts[i], r.output)
        first, last = seen[0][0], seen[-1][0]
        assert seen[-1][1] == r.output, (seen[-1], r)
        return (first - sent) * 1e3, (last - first) * 1e3 / (r.output - 1) if r.output > 1 else None

    try:
        await engine.flush()
        return list(await asyncio.gather(*(one(i) for i in range(len(prompts)))))
    finally:
        await engine.close()


async def facts_of(url: str) -> measure.Facts:
    engine = measure.Engine(url, "")
    try:
        return await engine.facts()
    finally:
        await engine.close()


def predict(profile: Profile, requests: Traffic, facts: measure.Facts) -> tuple[Outcome, ...]:
    """The stock policy on one GPU: engine settings are those that the server states."""
    nodes = hardware.fleet(f"1x1:{profile.gpu}", profile.model, profile.tp_sizes)
    pool = Pool("default/fidelity", "u", profile.model, (Tier("t", 60_000, 1000, default=True),), 1)
    policy = registry.build("plain-tp1", registry.Setting(pool, nodes, profile, profile))
    limits = EngineLimits(chunk=facts.chunk_max, max_running=facts.running_max)
    return Fleet(replace(policy, limits=lambda group: limits), nodes, profile, requests, gateways=1).run().outcomes


def between(before: Profile, after: Profile) -> Profile:
    """Means of two profiles with equal axes: other work on the machine changes while the trace runs. Else the first."""
    tables = {}
    for tp, a in before.tables.items():
        b = after.tables[tp]
        axes = [(t.batch, t.context, t.prefill_tokens, t.prefill_cached) for t in (a, b)]
        if axes[0] != axes[1]:
            return before
        means = [
            tuple(tuple((x + y) / 2 for x, y in zip(r, s, strict=True)) for r, s in zip(p, q, strict=True))
            for p, q in ((a.decode_ms, b.decode_ms), ((a.prefill_ms,), (b.prefill_ms,)), (a.prefill_cached_ms, b.prefill_cached_ms))
        ]
        tables[tp] = replace(a, decode_ms=means[0], prefill_ms=means[1][0], prefill_cached_ms=means[2], door_ms=(a.door_ms + b.door_ms) / 2)
    return replace(before, tables=tables)


def errors(pairs: list[Pair]) -> dict[str, Any]:
    """Medians of the relative errors, with sign and without."""
    out: dict[str, Any] = {"requests": len(pairs)}
    for name, both in (
        ("ttft", [(p.predicted_ttft, p.measured_ttft) for p in pairs]),
        ("tpot", [(p.predicted_tpot, p.measured_tpot) for p in pairs if p.measured_tpot and p.predicted_tpot]),
    ):
        relative = [(predicted - measured) / measured for predicted, measured in both]
        size = sorted(map(abs, relative))
        out[name] = {
            "median": round(statistics.median(size), 4),
            "p90": round(size[int(0.9 * (len(size) - 1))], 4),
            "median_signed": round(statistics.median(relative), 4),
            "measured_ms_p50": round(statistics.median(m for _, m in both), 2),
            "predicted_ms_p50": round(statistics.median(p for p, _ in both), 2),
        }
    return out


def slices(requests: Traffic, count: int) -> list[Traffic]:
    """Equal parts of the trace, each from its own second 0 on."""
    length = requests.duration_s / count
    parts = []
    for k in range(count):
        inside = [r for r in requests.requests if k * length <= r.arrived < (k + 1) * length]
        again = tuple(replace(r, rid=n, arrived=r.arrived - k * length) for n, r in enumerate(inside))
        parts.append(Traffic(length, again, {}, ()))
    return parts


def run(name: str, quick: bool, seed: int, console: Console) -> dict[str, Any]:
    """Profile, slice, profile, slice, ..., profile: what else runs on the machine changes faster than a trace lasts, so each slice is
    foretold with the mean of the profiles on either side of it."""
    spec = SPECS[name]
    points = replace(spec.points, repeats=1) if quick else spec.points
    count = 2 if quick else 4
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory(prefix="nitsum-f") as tmp, stock_server(spec.model(), Path(tmp), timeout_s=START_S) as url:

        def profiled() -> Profile:
            return asyncio.run(measure.measured(url, "", "slot", "", points, lambda text: console.print(f"  {text}", highlight=False)))

        facts = asyncio.run(facts_of(url))
        before = profiled()
        for k, part in enumerate(slices(traffic(name, count * spec.slice_s, seed, facts.prompt_max), count)):
            measured = asyncio.run(replay(url, part, 1000 * seed + k))
            after = profiled()
            for r, (ttft, tpot), o in zip(part.requests, measured, predict(between(before, after), part, facts), strict=True):
                assert o.ttft_ms is not None, (r, o)
                pairs.append(Pair(k, r.prompt, r.output, ttft, o.ttft_ms, tpot, o.tpot_ms))
            before = after
    return errors(pairs) | {"slices": count, "slice_s": spec.slice_s, "note": before.note, "pairs": [vars(p) for p in pairs]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a coarser profile, a shorter trace")
    options.add_argument("--model", choices=sorted(SPECS), action="append", help="only this one; may be repeated")
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--json", type=Path, metavar="FILE")
    args = options.parse_args()
    console = Console(stderr=True)
    out: dict[str, Any] = {
        "origin": "measured",
        "machine": {"cpus": os.cpu_count(), "python": sys.version.split()[0], "platform": platform.machine()},
        "versions": {name: metadata.version(name) for name in ("sglang", "torch")},
        "models": {},
    }
    table = Table(
        "model", "requests", "TTFT error", "TPOT error", "TTFT ms", "TPOT ms", title=f"predicted beside measured, wanted {WANTED:.0%}"
    )
    for name in args.model or list(SPECS):
        console.print(f"{name}: profile, then the trace")
        found = out["models"][name] = run(name, args.quick, args.seed, console)
        cells = [f"{found[k]['median']:.1%} (signed {found[k]['median_signed']:+.1%}, p90 {found[k]['p90']:.1%})" for k in ("ttft", "tpot")]
        cells += [f"{found[k]['predicted_ms_p50']} / {found[k]['measured_ms_p50']}" for k in ("ttft", "tpot")]
        table.add_row(name, str(found["requests"]), *cells)
    Console(width=160).print(table)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
