"""Waves of every kind of stream: their arrivals are the demand by which the planner flips, their answers what must not change."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from .conftest import MAX_TOKENS, Expected, System
from .kinds import KINDS, Seen, body, call

WAVES_MAX = 60
"""Of each kind."""
POLL_S = 0.3
Wave = dict[str, Seen]
"""By kind."""


async def stream_again(system: System, client: httpx.AsyncClient, kind: str, tier: str, stop: str, enough: asyncio.Event) -> list[Wave]:
    """One kind of stream after another, until `enough` and one more that began after it."""
    path, request = body(kind, system.model, MAX_TOKENS, stop)
    seen: list[Wave] = []
    last = False
    while not last and len(seen) < WAVES_MAX:
        last = enough.is_set()
        seen.append({kind: await call(client, path, request, headers={"x-nitsum-tier": tier})})
    return seen


def layout_of(tp_size: int) -> str:
    """All of it, as status writes it."""
    return f"{4 // tp_size}xTP{tp_size}"


async def waves_until(system: System, client: httpx.AsyncClient, tier: str, stop: str, tp_size: int) -> list[Wave]:
    """Until the layout is all of `tp_size` and each kind has seen it."""
    layout = layout_of(tp_size)
    return await waves_while(system, client, tier, stop, lambda status: status.get("layout") == layout, f"the layout is {layout}")


async def waves_while(
    system: System, client: httpx.AsyncClient, tier: str, stop: str, reached: Callable[[dict[str, Any]], bool], what: str
) -> list[Wave]:
    """Every kind at once, each over and over without waiting for the others, so that streams run whenever a change comes; until the pool
    is settled, its status is as wanted, and each kind has seen it. `what`: in words."""
    enough = asyncio.Event()
    running = asyncio.gather(*(stream_again(system, client, kind, tier, stop, enough) for kind in KINDS))
    while not running.done():
        await system.watch.refresh()
        if system.watch.settled and reached(system.watch.status):
            enough.set()
            break
        await asyncio.wait([running], timeout=POLL_S)
    seen = [wave for waves in await running for wave in waves]
    assert enough.is_set(), f"{len(seen)} streams of {tier}, and not: {what}\n{system.logs()}"
    return seen


def assert_equal(waves: list[Wave], expected: Expected, system: System) -> None:
    """Every stream of every wave, token for token; logprobs within what float32 sums differ by."""
    wrong = [
        f"stream {i}, {kind}: {s.differs(expected.seen[kind])}"
        for i, w in enumerate(waves)
        for kind, s in w.items()
        if s.key() != expected.seen[kind].key()
    ]
    assert not wrong, "\n".join([*wrong[:8], system.logs()])
    for w in waves:
        for kind, s in w.items():
            for i, values in expected.seen[kind].logprobs.items():
                assert s.logprobs[i] == pytest.approx(values, abs=1e-4), kind
