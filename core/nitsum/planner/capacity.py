"""SLO-safe capacity of one group for one tier, remembered: it depends on lengths and targets, not on rates, and lengths move slowly."""

import math
from collections import OrderedDict

from nitsum.attainment import Goal, Group, Lengths, Safe, safe
from nitsum.demand import TierDemand
from nitsum.perf import StepTimeModel

REMEMBERED_MAX = 8192
STEP, COARSE = 1.05, 1.5
"""Means of lengths count as the nearest power of the first, tails and burstiness of the second: less than any estimate of them is good
for, and it keeps plans from trembling."""
PRIOR_PROMPT, PRIOR_OUTPUT = 256.0, 128.0
"""Tokens, of a tier nobody has asked for yet."""


def rounded(value: float, step: float) -> float:
    return step ** round(math.log(max(value, 1.0)) / math.log(step))


class Capacity:
    """What a TP group can safely serve of one tier alone. Bounded; the oldest goes first."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], Safe] = OrderedDict()

    def of(self, model: StepTimeModel, tp_size: int, demand: TierDemand, goal: Goal, resident: tuple[int, ...]) -> Safe:
        prompt = rounded(demand.prompt_tokens_mean or PRIOR_PROMPT, STEP)
        output = rounded(demand.output_tokens_mean or PRIOR_OUTPUT, STEP)
        wide = tuple(
            rounded(p90 / mean, COARSE**0.5) if mean > 0 and p90 > mean else 1.0
            for p90, mean in ((demand.prompt_tokens_p90, demand.prompt_tokens_mean), (demand.output_tokens_p90, demand.output_tokens_mean))
        )
        rush = rounded(demand.cv**2, COARSE)
        key = getattr(model, "name", id(model)), tp_size, prompt, output, wide, rush, goal, resident
        if (found := self._known.get(key)) is None:
            group = Group(model, tp_size, Lengths(prompt, prompt * wide[0]), Lengths(output, output * wide[1]), rush, None, resident)
            found = self._known[key] = safe(group, goal)
            while len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return found
