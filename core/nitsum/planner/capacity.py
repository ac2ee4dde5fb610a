"""SLO-safe capacity of one group for one tier, remembered: it depends on lengths and targets, not on rates, and lengths move slowly."""

import math
from collections import OrderedDict
from dataclasses import dataclass

from nitsum.attainment import Goal, Group, Lengths, Safe, safe
from nitsum.demand import TierDemand
from nitsum.perf import StepTimeModel

REMEMBERED_MAX = 8192
STEP, RATIO, COARSE = 1.05, 1.2, 1.5
"""Means of lengths count as the nearest power of the first, tails of the second, burstiness of the third: no estimate of them is better,
and it keeps plans from trembling."""
PRIOR_PROMPT, PRIOR_OUTPUT = 256.0, 128.0
"""Tokens, of a tier nobody has asked for yet."""


def rounded(value: float, step: float) -> float:
    return step ** round(math.log(max(value, 1.0)) / math.log(step))


@dataclass(frozen=True)
class Mark:
    """What of a tier's demand its capacity depends on, rounded. Ratios: 90th percentile over mean."""

    prompt: float
    prompt_ratio: float
    output: float
    output_ratio: float
    dispersion: float


def mark(d: TierDemand) -> Mark:
    ratios = (
        rounded(p90 / mean, RATIO) if mean > 0 and p90 > mean else 1.0
        for p90, mean in ((d.prompt_tokens_p90, d.prompt_tokens_mean), (d.output_tokens_p90, d.output_tokens_mean))
    )
    prompt, output = rounded(d.prompt_tokens_mean or PRIOR_PROMPT, STEP), rounded(d.output_tokens_mean or PRIOR_OUTPUT, STEP)
    return Mark(prompt, next(ratios), output, next(ratios), rounded(d.cv**2, COARSE))


class Capacity:
    """What a TP group can safely serve of one tier alone. Bounded; the oldest goes first."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], Safe] = OrderedDict()

    def of(self, model: StepTimeModel, tp_size: int, m: Mark, goal: Goal, resident: tuple[int, ...]) -> Safe:
        key = getattr(model, "name", id(model)), tp_size, m, goal, resident
        if (found := self._known.get(key)) is None:
            prompt, output = Lengths(m.prompt, m.prompt * m.prompt_ratio), Lengths(m.output, m.output * m.output_ratio)
            found = self._known[key] = safe(Group(model, tp_size, prompt, output, m.dispersion, None, resident), goal)
            while len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return found
