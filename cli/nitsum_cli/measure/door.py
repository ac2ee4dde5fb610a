"""What a client waits for its first token outside the engine's steps."""

import asyncio
from statistics import median

from nitsum_cli.measure.engine import Engine

PAUSE_S = 0.5
DOOR_STEPS, DOOR_PROMPTS, DOOR_MOST = 48, 4, 0.5


def held_ms(streams_s: list[tuple[float, float, int]]) -> float:
    """How long a prompt holds a stream up, from (a stream by itself, one that others' prompts came to, how many came) each."""
    return median((beside - by_itself) / prompts * 1e3 for by_itself, beside, prompts in streams_s)


def door_of(whole_ms: float, held: float) -> float:
    """What of a prompt's time is no step. Between 0 and DOOR_MOST of it, whatever a noisy machine says."""
    return min(max(whole_ms - held, 0.0), DOOR_MOST * whole_ms)


async def doors_ms(engine: Engine, chunk: int, ctx: int, repeats: int) -> tuple[float, float]:
    """What a client waits for its first token beyond what it holds others up: (prompts follow at once, they come after a pause as in
    traffic). Then processes that sleep must wake, and a core that did other work is slower."""

    async def stream_s(prompts: int) -> float:
        begun = asyncio.Event()
        stream = asyncio.create_task(engine.stream(engine.prompt(ctx), DOOR_STEPS, begun))
        waiter = asyncio.create_task(begun.wait())
        await asyncio.wait([stream, waiter], return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        for _ in range(prompts):
            await engine.first_token(engine.prompt(chunk))
        seen = await stream
        return seen[-1][0] - seen[0][0]

    pairs, at_once, paused = [], [], []
    for _ in range(repeats):
        pairs.append((await stream_s(0), await stream_s(DOOR_PROMPTS), DOOR_PROMPTS))
        at_once += [(await engine.first_token(engine.prompt(chunk)))[0] for _ in range(2)]
        for _ in range(2):
            await engine.pause(PAUSE_S)
            paused.append((await engine.first_token(engine.prompt(chunk)))[0])
    held = held_ms(pairs)
    return door_of(median(at_once), held), door_of(median(paused), held)
