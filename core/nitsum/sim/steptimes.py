"""Step times of one engine, made quick: decode lines by batch size, with the sum over many steps and its inverse in closed form.

In a run of decode steps nothing joins or leaves, so the mean context grows by one a step and the step time, piecewise linear in it, adds
up to a few arithmetic series. The model is asked once per batch size and knot.
"""

import math
from bisect import bisect_right

from nitsum.perf import StepTimeModel, door_ms

KNOTS = (1, 16, 64, *(round(2 ** (k / 2)) for k in range(14, 37)))
"""Contexts at which decode lines are sampled: half octaves up to 262,144."""
CACHED_MAX = 100_000


class StepTimes:
    """Milliseconds of `model` at one TP degree. Shared by all engines of that degree."""

    def __init__(self, model: StepTimeModel, tp_size: int) -> None:
        self.model, self.tp_size = model, tp_size
        self._lines: dict[int, tuple[list[float], list[float]]] = {}
        self._prefill: dict[tuple[int, int], float] = {}
        self._mixed: dict[tuple[int, int, int], float] = {}

    def _line(self, batch: int) -> tuple[list[float], list[float]]:
        """(value at each knot, slope from each knot on; the last slope goes on)."""
        if (line := self._lines.get(batch)) is None:
            ys = [self.model.decode_ms(self.tp_size, batch, x) for x in KNOTS]
            slopes = [(ys[i + 1] - ys[i]) / (KNOTS[i + 1] - KNOTS[i]) for i in range(len(KNOTS) - 1)]
            line = self._lines[batch] = (ys, [*slopes, slopes[-1]])
        return line

    def decode(self, batch: int, ctx: float) -> float:
        ys, slopes = self._line(batch)
        i = max(bisect_right(KNOTS, ctx) - 1, 0)
        return ys[i] + slopes[i] * (ctx - KNOTS[i])

    def decode_run(self, batch: int, ctx: float, steps: int) -> float:
        """Sum of `steps` decodes at ctx, ctx + 1, ..."""
        ys, slopes = self._line(batch)
        i, total, left = max(bisect_right(KNOTS, ctx) - 1, 0), 0.0, steps
        while left:
            n = left if i + 1 >= len(KNOTS) else min(math.ceil(KNOTS[i + 1] - ctx), left)
            total += n * (ys[i] + slopes[i] * (ctx - KNOTS[i] + (n - 1) / 2))
            ctx, left, i = ctx + n, left - n, i + 1
        return total

    def steps_within(self, batch: int, ctx: float, steps: int, budget_ms: float) -> int:
        """How many of `steps` decodes end within the budget."""
        ys, slopes = self._line(batch)
        i, done = max(bisect_right(KNOTS, ctx) - 1, 0), 0
        while done < steps:
            n = steps - done if i + 1 >= len(KNOTS) else min(math.ceil(KNOTS[i + 1] - ctx), steps - done)
            first, slope = ys[i] + slopes[i] * (ctx - KNOTS[i]), slopes[i]
            whole = n * (first + slope * (n - 1) / 2)
            if whole > budget_ms:
                if abs(slope) < 1e-12:
                    fit = budget_ms / first
                else:  # n * first + slope * n * (n - 1) / 2 = budget
                    b = first - slope / 2
                    fit = (math.sqrt(max(b * b + 2 * slope * budget_ms, 0.0)) - b) / slope
                return done + min(int(fit + 1e-9), n)
            budget_ms -= whole
            ctx, done, i = ctx + n, done + n, i + 1
        return steps

    def prefill(self, tokens: int, cached: int = 0) -> float:
        """`tokens` new ones in one step, behind `cached`."""
        if (found := self._prefill.get((tokens, cached))) is None:
            if len(self._prefill) > CACHED_MAX:
                self._prefill.clear()
            found = self._prefill[tokens, cached] = self.model.prefill_ms(self.tp_size, tokens, cached)
        return found

    def prefill_batch(self, parts: list[tuple[int, int]]) -> float:
        """Several prompts in one step: (new, cached) tokens of each. Attention behind what is cached comes on top."""
        total = self.prefill(sum(n for n, _ in parts))
        for n, cached in parts:
            if cached:
                total += self.prefill(n, cached) - self.prefill(n)
        return total

    def mixed(self, parts: list[tuple[int, int]], batch: int, ctx: float) -> float:
        """Prefill chunks and `batch` decodes in one step."""
        key = (sum(n for n, _ in parts), batch, round(ctx / 16) * 16)
        if (found := self._mixed.get(key)) is None:
            if len(self._mixed) > CACHED_MAX:
                self._mixed.clear()
            found = self._mixed[key] = self.model.mixed_ms(self.tp_size, key[0], batch, max(key[2], 1))
        return found + sum(self.prefill(n, cached) - self.prefill(n) for n, cached in parts if cached)


class QuickModel:
    """Implements StepTimeModel: `model` read through StepTimes, so that a planner that asks often is answered quickly."""

    def __init__(self, model: StepTimeModel) -> None:
        self.model, self.name, self.origin, self.tp_sizes = model, getattr(model, "name", "?"), model.origin, model.tp_sizes
        self.times = {tp: StepTimes(model, tp) for tp in model.tp_sizes}

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        return self.times[tp_size].prefill(chunk, ctx)

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return self.times[tp_size].decode(batch, ctx)

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        return self.times[tp_size].mixed([(chunk, 0)], batch, ctx)

    def door_ms(self, tp_size: int) -> float:
        return door_ms(self.model, tp_size)

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return self.model.kv_capacity_tokens(tp_size, resident_tp)
