"""What a step takes: decode from the pace of streams that run together, prefill from first tokens."""

import asyncio
import math
from statistics import median

from nitsum_cli.measure.engine import Engine
from nitsum_cli.measure.points import STEPS, STEPS_MAX

TOKENS_LEAST = 12
BURST_S = 0.0005


def _bursts(stream: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """(when, tokens by then): messages closer than BURST_S are one."""
    out: list[tuple[float, int]] = []
    last = -math.inf
    for t, n in stream:
        if out and t - last < BURST_S:
            out[-1] = out[-1][0], n
        else:
            out.append((t, n))
        last = t
    return out


def paces_ms(streams: list[list[tuple[float, int]]]) -> list[float]:
    """Time per token of each stream while all of them run, if that is TOKENS_LEAST or more of its tokens. Over the whole time, not from
    message to message: messages come in bursts, on a busy machine a whole stream's in one. What comes at once counts as of then."""
    streams = [_bursts(s) for s in streams]
    begin, end = max(s[0][0] for s in streams), min(s[-1][0] for s in streams)
    found = []
    for s in streams:
        within = [(t, n) for t, n in s if begin <= t <= end]
        if within and (tokens := within[-1][1] - within[0][1]) >= TOKENS_LEAST:
            found.append((within[-1][0] - within[0][0]) / tokens * 1e3)
    return found


async def decode_ms(engine: Engine, batch: int, ctx: int, repeats: int) -> float | None:
    """Median step with `batch` streams around `ctx`; None where they never ran all together."""
    steps, found, runs = STEPS, [], 0
    while steps <= STEPS_MAX and runs < repeats:
        prompts = [engine.prompt(max(ctx - steps // 2, 1)) for _ in range(batch)]
        streams = await asyncio.gather(*(engine.stream(p, steps) for p in prompts))
        if all(streams) and len(paces := paces_ms(streams)) == batch:
            # Each run is one voice: a neighbour that spoils a whole run spoils no more.
            found.append(median(paces))
            runs += 1
        else:
            steps *= 2
    return median(found) if found else None


async def prefill_ms(engine: Engine, chunk: int, prefix: list[int], repeats: int) -> float | None:
    """Median; None where the engine does not keep the prefix."""
    found = []
    for _ in range(repeats):
        ms, cached = await engine.first_token(prefix + engine.prompt(chunk))
        if cached < 0.9 * len(prefix):
            return None
        found.append(ms)
    return median(found)
