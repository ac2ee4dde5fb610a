"""How much prefill the next engine step may carry beside streams that decode, and what budget keeps a tier's TPOT. Pure.

An engine that prefills first lets every stream wait for a whole prompt, however small its chunks. Governed, each step carries the decodes
and at most a budget of prefill tokens; where the two cannot share a step they take turns, so that a stream waits for one chunk at most.
"""

from dataclasses import dataclass

from nitsum.perf import StepTimeModel

CHUNK_MIN = 64
"""Of a budget: a step's fixed part would be paid too often for less."""
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
        chunk = pages * page
        dearer = model.prefill_ms(tp_size, chunk, behind) - model.prefill_ms(tp_size, chunk) if behind else 0.0
        return model.mixed_ms(tp_size, chunk, batch, ctx) + max(dearer, 0.0) <= tpot_ms

    low, high = 1, max(chunk_max // page, 1)
    if fits(high):
        return high * page
    while high - low > 1:  # high does not fit; low does, or is one page
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * page


def batch_max(model: StepTimeModel, tp_size: int, prompt: float, output: float, tpot_ms: float, kv_tokens: int) -> int:
    """Most requests that may run so that a step of theirs that also carries its part of prefill ends within `tpot_ms`; at least 1.

    Where requests of `prompt` and `output` tokens (means) come as fast as they end, b decodes go with b x prompt / output of prefill.
    """
    ctx = max(int(prompt + output / 2), 1)

    def fits(b: int) -> bool:
        return model.mixed_ms(tp_size, min(max(round(b * prompt / output), 1), CHUNK_MAX), b, ctx) <= tpot_ms

    low, high = 1, max(int(kv_tokens / (prompt + output)), 1)
    if fits(high):
        return high
    while high - low > 1:  # high does not fit; low does, or is one
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_budget(model: StepTimeModel, tp_size: int, batch: int, ctx: int, tpot_ms: float, chunk_max: int = CHUNK_MAX) -> int:
    """`prefill_budget` beside as many as may run (`batch_max`: then prefill keeps up as well), never below CHUNK_MIN."""
    within = prefill_budget(model, tp_size, batch, ctx, tpot_ms, chunk_max=chunk_max)
    return max(within, CHUNK_MIN) if within else 0
