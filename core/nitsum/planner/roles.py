"""SLO-safe capacity of groups that only prefill or only decode, by the same model as `objective` for mixed ones.

Prefill: M/D/1 for prompts, no stream waits beside them, so TTFT alone binds. Decode: no prompt stretches a step, so TPOT and KV bind; what
loading KV costs runs beside the steps.
"""

import math

from nitsum.layout import Role
from nitsum.objective import Load, Targets, safe_rate
from nitsum.perf import StepTimeModel

BATCH_TOKENS = 8192
"""Prompts that an engine prefills in one step."""


class DecodeOnly:
    """`model` where prompts cost nothing. Implements StepTimeModel."""

    def __init__(self, model: StepTimeModel) -> None:
        self.model, self.origin, self.tp_sizes = model, model.origin, model.tp_sizes

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        return 0.0

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return self.model.decode_ms(tp_size, batch, ctx)

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        return self.model.decode_ms(tp_size, batch, ctx)

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return self.model.kv_capacity_tokens(tp_size, resident_tp)


def safe_of(
    role: Role, model: StepTimeModel, tp_size: int, load: Load, targets: Targets, resident_tp: tuple[int, ...] = ()
) -> tuple[float, str, int]:
    """`objective.safe_rate` of a group in this role: (requests/s, what binds above it, how many may run at once)."""
    if role is Role.DECODE:
        return safe_rate(DecodeOnly(model), tp_size, load, Targets(None, targets.tpot_ms), resident_tp)
    if role is Role.PREFILL:
        rate, binding, _ = safe_rate(model, tp_size, Load(load.rate, load.prompt, 1.0), Targets(targets.ttft_ms, None), resident_tp)
        return rate, binding, (max(math.ceil(2 * BATCH_TOKENS / max(load.prompt, 1.0)), 2) if rate > 0 else 0)
    return safe_rate(model, tp_size, load, targets, resident_tp)
