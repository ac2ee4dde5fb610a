"""SLO-safe capacity of one group for one tier, remembered: it depends on lengths and targets, not on rates, and lengths move slowly."""

import math
from collections import OrderedDict

from nitsum.objective import Load, Targets, safe_rate
from nitsum.perf import StepTimeModel

REMEMBERED_MAX = 8192
STEP = 1.05
"""Lengths count as the nearest power of this: 5 % is less than any estimate of them is good for, and keeps plans from trembling."""


def rounded(tokens: float) -> float:
    return STEP ** round(math.log(max(tokens, 1.0)) / math.log(STEP))


class Capacity:
    """(safe requests/s, what binds, batch at it) of a TP group that serves one tier alone. Bounded; the oldest goes first."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], tuple[float, str, int]] = OrderedDict()

    def of(
        self, model: StepTimeModel, name: str, tp_size: int, prompt: float, output: float, targets: Targets, resident: tuple[int, ...]
    ) -> tuple[float, str, int]:
        """`name` tells profiles apart."""
        prompt, output = rounded(prompt), rounded(output)
        key = name, tp_size, prompt, output, targets, resident
        if key not in self._known:
            self._known[key] = safe_rate(model, tp_size, Load(0.0, prompt, output), targets, resident)
            while len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return self._known[key]
