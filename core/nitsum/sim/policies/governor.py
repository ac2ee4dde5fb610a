"""How many prefill tokens a step may carry beside decode, from the model and what the planner says that a group can take.

The largest chunk whose mixed step, at the capacity's batch, still ends within the tightest TPOT that the group serves; but never so small
that prefill falls behind the rate that the capacity promises.
"""

from collections.abc import Callable

from nitsum.layout import Group
from nitsum.perf import StepTimeModel
from nitsum.pool import Pool
from nitsum.sim.engine import EngineLimits
from nitsum.sim.steptimes import QuickModel

CHUNKS = tuple(round(64 * 2 ** (k / 4)) for k in range(29))
"""64 to 8,192 tokens."""
CTX = 2048
SPARE = 1.25
"""Prefill must keep up with more than the promised rate, or its queue never empties."""


def sized(model: StepTimeModel, pool: Pool) -> Callable[[Group], EngineLimits]:
    quick = QuickModel(model)
    known: dict[tuple[int, int, int, float | None], EngineLimits] = {}

    def chosen(tp_size: int, batch: int, prefill_tokens_per_s: float, tpot_ms: float | None) -> EngineLimits:
        if tpot_ms is None:
            return EngineLimits()
        steps = [(c, quick.mixed_ms(tp_size, c, batch, CTX)) for c in CHUNKS]
        within = max((c for c, ms in steps if ms <= tpot_ms), default=CHUNKS[0])
        enough = next((c for c, ms in steps if c / ms * 1e3 >= SPARE * prefill_tokens_per_s), CHUNKS[-1])
        return EngineLimits(mixed_tokens=max(within, enough))

    def limits(group: Group) -> EngineLimits:
        tiers = {s.tier for s in group.shares if s.share > 0}
        tpot_ms = min((t.tpot_ms for t in pool.tiers if t.name in tiers and t.tpot_ms is not None), default=None)
        rate = group.capacity.prefill_tokens_per_s
        key = (group.tp_size, max(group.capacity.max_running, 1), round(rate / 500), tpot_ms)
        if key not in known:
            if len(known) > 10_000:
                known.clear()
            known[key] = chosen(key[0], key[1], key[2] * 500.0, tpot_ms)
        return known[key]

    return limits
