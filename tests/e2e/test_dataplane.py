"""Two agents serve one pool; eight kinds of streams cross a flip TP1 -> TP2 and one back, equal to a stock engine, token for token."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.stock import stock_server

from .dataplane import DataPlane
from .kinds import Seen, reference, together

MAX_TOKENS = 160


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[DataPlane]:
    p = DataPlane(tmp_path, "tiny-llama", tiny_llama(), slots=(2, 2))
    p.start()
    try:
        yield p
    finally:
        p.stop()


async def flip(p: DataPlane, tp_size: int) -> None:
    """Both nodes, as the operator would: directives, then routes from the reports."""
    directives = [n.directive(tp_size, (1, 2), p.model_path) for n in p.nodes]
    answers = await asyncio.gather(*(n.apply(d) for n, d in zip(p.nodes, directives, strict=True)))
    assert all(a.WhichOneof("answer") == "accepted" for a in answers), answers
    reports = await asyncio.gather(*(n.wait_applied(d.operation_id) for n, d in zip(p.nodes, directives, strict=True)))
    answer = await p.apply_routes(list(reports))
    assert answer.WhichOneof("answer") == "accepted", answer


@pytest.mark.timeout(900)
async def test_streams_survive_flips_and_equal_a_stock_engine(plane: DataPlane, tmp_path: Path) -> None:
    with stock_server(plane.model_path, tmp_path) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            expected, stop = await reference(client, "default", MAX_TOKENS)
    assert not [s.error for s in expected.values() if s.error]
    await asyncio.gather(*(n.describe() for n in plane.nodes))
    await flip(plane, 1)
    await plane.wait_serving()
    async with plane.client() as client:
        task = asyncio.create_task(together(client, plane.model, MAX_TOKENS, stop))
        await asyncio.sleep(1.0)
        began = time.monotonic()
        await flip(plane, 2)
        between = time.monotonic()
        await flip(plane, 1)
        got = await task
    problems = [
        f"{kind}:\n  got      {s.key()}\n  expected {expected[kind].key()}" for kind, s in got.items() if s.key() != expected[kind].key()
    ]
    assert not problems, "\n".join(problems) + plane.logs()
    for kind, s in got.items():
        _close(s, expected[kind])
    crossed = [k for k, s in got.items() if s.times and s.times[0] < began and s.times[-1] > between]
    gaps = [max(b - a for a, b in zip(s.times, s.times[1:], strict=False)) * 1e3 for k, s in got.items() if k in crossed]
    assert len(crossed) >= 4, f"too few streams crossed the flip: {crossed}"
    print(f"{len(crossed)} streams across the flip, widest gap p50 {statistics.median(gaps):.0f} ms, max {max(gaps):.0f} ms")


def _close(got: Seen, expected: Seen) -> None:
    for i, values in expected.logprobs.items():
        assert got.logprobs[i] == pytest.approx(values, abs=1e-4)
