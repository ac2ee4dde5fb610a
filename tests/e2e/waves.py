"""Waves of every kind of stream: their arrivals are the demand by which the planner flips, their answers what must not change."""

import asyncio

import httpx
import pytest

from .conftest import MAX_TOKENS, Expected, System
from .kinds import KINDS, Seen, body, call

WAVES_MAX = 40
Wave = dict[str, Seen]


async def wave(system: System, client: httpx.AsyncClient, tier: str, stop: str) -> Wave:
    """Every kind at once, for one tier."""
    calls = (call(client, *body(kind, system.model, MAX_TOKENS, stop), headers={"x-nitsum-tier": tier}) for kind in KINDS)
    return dict(zip(KINDS, await asyncio.gather(*calls), strict=True))


async def waves_until(system: System, client: httpx.AsyncClient, tier: str, stop: str, tp_size: int) -> list[Wave]:
    """Wave after wave, until the layout is all of `tp_size` and one more wave has seen it."""
    seen: list[Wave] = []
    for _ in range(WAVES_MAX):
        await system.watch.refresh()
        there = system.watch.settled and system.watch.status.get("layout") == f"{4 // tp_size}xTP{tp_size}"
        seen.append(await wave(system, client, tier, stop))
        if there:
            return seen
    raise AssertionError(f"{WAVES_MAX} waves of {tier}, and the layout is not TP{tp_size}\n{system.logs()}")


def assert_equal(waves: list[Wave], expected: Expected, system: System) -> None:
    """Every stream of every wave, token for token; logprobs within what float32 sums differ by."""
    wrong = [
        f"wave {i}, {kind}: {s.differs(expected.seen[kind])}"
        for i, w in enumerate(waves)
        for kind, s in w.items()
        if s.key() != expected.seen[kind].key()
    ]
    assert not wrong, "\n".join([*wrong[:8], system.logs()])
    for w in waves:
        for kind, s in w.items():
            for i, values in expected.seen[kind].logprobs.items():
                assert s.logprobs[i] == pytest.approx(values, abs=1e-4), kind
