"""Apply a pool, and live streams survive flips that the planner decided: every kind of stream, equal to a stock engine token for token."""

import asyncio
import statistics
import time
from pathlib import Path

import httpx
import pytest

from nitsum_local.demo import flips
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.stock import stock_server

from .conftest import System
from .kinds import KINDS, Seen, body, call, reference

MAX_TOKENS = 160
WAVES_MAX = 40
pytestmark = pytest.mark.asyncio(loop_scope="module")


async def wave(system: System, client: httpx.AsyncClient, tier: str, stop: str) -> dict[str, Seen]:
    """Every kind at once, for one tier: their arrivals are the demand that the planner sees."""
    calls = (call(client, *body(kind, system.model, MAX_TOKENS, stop), headers={"x-nitsum-tier": tier}) for kind in KINDS)
    return dict(zip(KINDS, await asyncio.gather(*calls), strict=True))


async def waves_until(system: System, client: httpx.AsyncClient, tier: str, stop: str, tp_size: int) -> list[dict[str, Seen]]:
    """Wave after wave, until the layout is all of `tp_size` and one more wave has seen it."""
    seen: list[dict[str, Seen]] = []
    for _ in range(WAVES_MAX):
        await system.watch.refresh()
        there = system.watch.settled and system.watch.status.get("layout") == f"{4 // tp_size}xTP{tp_size}"
        seen.append(await wave(system, client, tier, stop))
        if there:
            return seen
    raise AssertionError(f"{WAVES_MAX} waves of {tier}, and the layout is not TP{tp_size}\n{system.logs()}")


@pytest.mark.timeout(900)
async def test_streams_survive_what_the_planner_decides(system: System, tmp_path: Path) -> None:
    with stock_server(tiny_llama(), tmp_path) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            expected, stop = await reference(client, "default", MAX_TOKENS)
    assert not [s.error for s in expected.values() if s.error]
    began, flipped = time.monotonic(), system.watch.flips
    async with system.client() as client:
        waves = await waves_until(system, client, "agents", stop, 1)
        waves += await waves_until(system, client, "interactive", stop, 2)
    wrong = [
        f"wave {i}, {kind}: {s.differs(expected[kind])}"
        for i, w in enumerate(waves)
        for kind, s in w.items()
        if s.key() != expected[kind].key()
    ]
    assert not wrong, "\n".join(wrong[:4]) + system.logs()
    for w in waves:
        for kind, s in w.items():
            for i, values in expected[kind].logprobs.items():
                assert s.logprobs[i] == pytest.approx(values, abs=1e-4), kind
    lines = system.stage.awake_lines()
    assert not flips.overlaps(lines), flips.overlaps(lines)
    windows = [w for n in system.stage.nodes for w in flips.windows([x for x in lines if x["gpus"][0].startswith(n.name)], began)]
    assert len(windows) >= 4, f"each of two nodes flips there and back: {windows}"
    gaps = [
        max(b - a for a, b in zip(s.times, s.times[1:], strict=False)) * 1e3
        for wave_ in waves
        for s in wave_.values()
        if s.times and any(s.times[0] < f.start and s.times[-1] > f.end for f in windows)
    ]
    assert len(gaps) >= 8, f"too few streams crossed a flip: {len(gaps)} in {len(waves)} waves"
    await system.watch.refresh()
    status = system.watch.status
    assert system.watch.flips >= flipped + 2, status
    assert "2xTP2" in status["layout"]
    assert status["plan"]["profileOrigin"] == "modelled"
    assert {f["outcome"] for f in status["lastFlips"]} == {"Done"}
    print(f"{len(waves)} waves, {len(gaps)} streams across a flip, gap p50 {statistics.median(gaps):.0f} ms, max {max(gaps):.0f} ms")
