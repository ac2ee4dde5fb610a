"""How much prefill the next engine step may carry beside streams that decode, and what budget keeps a tier's TPOT. Pure.

An engine that prefills first lets every stream wait for a whole prompt, however small its chunks. Governed, each step carries the decodes
and at most a budget of prefill tokens; where the two cannot share a step they take turns, so that a stream waits for one chunk at most.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nitsum.perf import StepTimeModel

CHUNK_MIN = 64
"""Of a budget: a step's fixed part would be paid too often for less."""
LUMP, MEAN = 1.5, 0.95
"""Of a TPOT that leaves no room for prefill beside decode: how long a step with prefill may be, and the mean of all."""
CHUNK_MAX = 8192
"""Prefill tokens of a step that nothing waits for."""
PAGE = 16


@dataclass(frozen=True)
class Room:
    """For prefill in the next step. `mixed`: the decodes run in it too."""

    tokens: int
    mixed: bool


def room(budget: int, decodes: int, chunk_max: int, align: int = 1, mixes: bool = True, decodes_waited: bool = False) -> Room:
    """`budget` 0: not limited. `chunk_max`: tokens that the engine's buffers hold. Chunks end on a multiple of `align`, which is at most
    `chunk_max`; a smaller budget counts as one of them, for prefill must go on. `decodes_waited`: the last step was prefill alone."""
    if not budget or not decodes:
        return Room(chunk_max, False)
    if decodes_waited:
        return Room(0, False)
    wanted = max(budget // align, 1) * align
    beside = (chunk_max - decodes) // align * align
    if mixes and beside > 0:
        return Room(min(wanted, beside), True)
    return Room(min(wanted, chunk_max), False)


def step_ms(model: StepTimeModel, tp_size: int, chunk: int, batch: int, ctx: int, behind: int = 0) -> float:
    """Of a step with `chunk` prefill tokens behind `behind` cached ones of their prompts, beside `batch` decodes of mean length `ctx`."""
    dearer = model.prefill_ms(tp_size, chunk, behind) - model.prefill_ms(tp_size, chunk) if behind > 0 else 0.0
    return model.mixed_ms(tp_size, chunk, batch, ctx) + max(dearer, 0.0)


def depth(prompt: float, chunk: float) -> int:
    """Cached tokens that a chunk has behind it on average, where prompts of mean `prompt` spread like an exponential distribution."""
    return max(int(prompt - chunk / 2), 0)


def prefill_budget(
    model: StepTimeModel,
    tp_size: int,
    batch: int,
    ctx: int,
    tpot_ms: float,
    behind: int = 0,
    page: int = PAGE,
    chunk_max: int = CHUNK_MAX,
) -> int:
    """Most prefill tokens, in whole pages, whose step beside `batch` decodes of mean length `ctx` ends within `tpot_ms`; 0: no target.

    `tpot_ms` is what the tightest running tier leaves for a step: its target, or its target and the slack that its streams have gained.
    `behind`: cached tokens of the prompts that are prefilled, whose attention makes late chunks dearer. Never less than a page: where even
    that takes too long, it is for the ledger to run fewer streams. Raises KeyError for a TP degree that the model lacks.
    """
    if tpot_ms <= 0:
        return 0

    def fits(pages: int) -> bool:
        return step_ms(model, tp_size, pages * page, batch, ctx, behind) <= tpot_ms

    return largest(fits, max(chunk_max // page, 1)) * page


def batch_max(model: StepTimeModel, tp_size: int, prompt: float, output: float, tpot_ms: float, kv_tokens: int, ctx: int = 0) -> int:
    """Most requests that may run so that a step of theirs that also carries its part of prefill ends within `tpot_ms`; at least 1.

    Where requests of `prompt` and `output` tokens (means) come as fast as they end, b decodes go with b x prompt / output of prefill.
    `ctx`: mean length of those that run, where outputs are not alike: long ones run longest.
    """
    ctx = ctx or max(int(prompt + output / 2), 1)

    def fits(b: int) -> bool:
        chunk = min(max(round(b * prompt / output), 1), CHUNK_MAX)
        return step_ms(model, tp_size, chunk, b, ctx, depth(prompt, chunk)) <= tpot_ms

    return largest(fits, max(int(kv_tokens / (prompt + output)), 1))


def streams_max(model: StepTimeModel, tp_size: int, prompt: float, output: float, tpot_ms: float, kv_tokens: int) -> int:
    """Most streams that may decode where prompts come prefilled, so that the mean of their steps is within `tpot_ms`; at least 1.

    One that comes costs its step the rest of a page. A stream sees as many steps as it has tokens, so the mean is what it gets.
    """
    ctx = max(int(prompt + output / 2), 1)

    def fits(b: int) -> bool:
        alone = model.decode_ms(tp_size, b, ctx)
        return alone + min(b / output, 1.0) * (step_ms(model, tp_size, PAGE, b, ctx, int(prompt)) - alone) <= tpot_ms

    return largest(fits, max(int(kv_tokens / (prompt + output)), 1))


def sizes(
    model: StepTimeModel, tp_size: int, prompt: float, output: float, tpot_ms: float, kv_tokens: int, ctx: int = 0
) -> tuple[int, int]:
    """(requests of these mean lengths that may run, prefill tokens of a step beside them) so that a tier keeps `tpot_ms`; `ctx` as above.

    Every step ends within it where that leaves room for CHUNK_MIN; then prefill keeps up as well (`batch_max`). Else steps with prefill are
    longer, up to LUMP times the target, and so few that the mean over steps is within MEAN of it.
    """
    ctx = ctx or max(int(prompt + output / 2), 1)
    most = batch_max(model, tp_size, prompt, output, tpot_ms, kv_tokens, ctx)
    first = prefill_budget(model, tp_size, most, ctx, tpot_ms)
    chunk = prefill_budget(model, tp_size, most, ctx, tpot_ms, depth(prompt, first))
    if chunk >= CHUNK_MIN or tpot_ms <= 0:
        return most, chunk

    def lump(b: int) -> int:
        return max(prefill_budget(model, tp_size, b, ctx, LUMP * tpot_ms), CHUNK_MIN)

    def fits(b: int) -> bool:
        chunk, alone = lump(b), model.decode_ms(tp_size, b, ctx)
        often = min(b * prompt / output / chunk, 1.0)
        return alone + often * (step_ms(model, tp_size, chunk, b, ctx, depth(prompt, chunk)) - alone) <= MEAN * tpot_ms

    most = largest(fits, max(int(kv_tokens / (prompt + output)), 1))
    return most, lump(most)


def largest(fits: Callable[[int], bool], high: int) -> int:
    """The largest that fits, by bisection; at least 1."""
    low = 1
    if fits(high):
        return high
    while high - low > 1:  # high does not fit; low does, or is one
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
