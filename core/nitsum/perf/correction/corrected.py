"""The step-time model that is made of a base and of what was learned: a line for each (TP, phase), and what they lend each other."""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitsum.layout import FlipMode
from nitsum.perf import StepTimeModel, door_ms
from nitsum.perf.correction.line import Bounds, Line
from nitsum.perf.correction.timing import Phase, StepTiming
from nitsum.perf.flip import KvFate
from nitsum.perf.tables import TYPICAL_STREAM_TOKENS, Profile

CONFIDENCE_STEP = 0.1
"""By which two models differ clearly."""


@dataclass(frozen=True)
class Learned:
    """`confidence` 0 (the profile alone) to 1; `error`: typical relative error of what the corrected model predicted, None without data."""

    offset_ms: float
    factor: float
    confidence: float
    accepted: int
    rejected: int
    error: float | None


class Corrected:
    """A StepTimeModel over another one. `observe` feeds it; without data it is the base model, to the bit.

    What a Profile takes beyond the port (`sequences`, `cached`, arrays) works here where the base is one.
    """

    def __init__(self, base: StepTimeModel, bounds: Bounds | None = None) -> None:
        self.base = base
        self._profile = base if isinstance(base, Profile) else None
        self.bounds = bounds or Bounds()
        self._lines: dict[tuple[int, Phase], Line] = {}
        self._smallest = {tp: {Phase.PREFILL: base.prefill_ms(tp, 1), Phase.DECODE: base.decode_ms(tp, 1, 1)} for tp in base.tp_sizes}
        self._applied: dict[tuple[int, Phase], tuple[float, float]] = {}
        self.version = 0
        """Of a model that was taken by `fixed`; with its name it tells models apart."""

    def fixed(self, version: int) -> "Corrected":
        """As it is now, and learns no more: what plans are made with must not move under them."""
        taken = copy.copy(self)
        taken._lines, taken._applied, taken.version = copy.deepcopy(self._lines), {}, version
        return taken

    def far_from(self, other: "Corrected", part: float) -> bool:
        """Whether the two differ by more than this part of some step's time, small or large, or clearly in how sure they are."""
        if abs(self.overall - other.overall) > CONFIDENCE_STEP:
            return True
        for tp, phase in itertools.product(self.tp_sizes, {p for _, p in self._lines}):
            (a, b), (c, d) = self._line_of(tp, phase), other._line_of(tp, phase)
            small = (b - d) / self._step(tp, phase)
            if max(abs(a - c), abs(a - c + small)) > part * max(c, self.bounds.factor_min):
                return True
        return False

    @property
    def steps(self) -> int:
        """Measurements that were taken in."""
        return sum(line.accepted for line in self._lines.values())

    @property
    def overall(self) -> float:
        """Mean confidence of what was measured; 0: nothing was."""
        measured = [line.confidence for line in self._lines.values() if line.weight]
        return sum(measured) / len(measured) if measured else 0.0

    def door_ms(self, tp_size: int) -> float:
        """As measured: no step says anything of it."""
        return door_ms(self.base, tp_size)

    def observe(self, timing: StepTiming) -> bool:
        """False: not taken, an outlier or nothing that can be compared (no data at this TP, no time, no tokens)."""
        t = timing
        if t.tp_size not in self.base.tp_sizes or not (t.chunk or t.batch) or not (math.isfinite(t.ms) and t.ms > 0):
            return False
        predicted = self._base_ms(t)
        line = self._lines.setdefault((t.tp_size, t.phase), Line(self.bounds))
        before = line.accepted
        line.add(t.ms / predicted, self._step(t.tp_size, t.phase) / predicted)
        self._applied.clear()
        return line.accepted > before

    def _base_ms(self, t: StepTiming) -> float:
        match t.phase:
            case Phase.PREFILL:
                return self.base.prefill_ms(t.tp_size, t.chunk, t.ctx)
            case Phase.DECODE:
                return self.base.decode_ms(t.tp_size, t.batch, t.ctx)
            case Phase.MIXED:
                return self.base.mixed_ms(t.tp_size, t.chunk, t.batch, t.ctx)

    def _step(self, tp_size: int, phase: Phase) -> float:
        return self._smallest[tp_size][Phase.DECODE if phase is Phase.MIXED else phase]

    def _others(self, tp_size: int, phase: Phase) -> Iterator[Line]:
        return (line for (tp, p), line in self._lines.items() if p is phase and tp != tp_size and line.weight)

    def learned(self, tp_size: int, phase: Phase) -> Learned:
        """As it is applied, what is borrowed from other TPs included; the counts and the confidence are this TP's own."""
        factor, offset = self._line_of(tp_size, phase)
        own = self._lines.get((tp_size, phase))
        if own is None:
            return Learned(offset, factor, 0.0, 0, 0, None)
        return Learned(offset, factor, own.confidence, own.accepted, own.rejected, own.error)

    def confidence(self, tp_size: int, phase: Phase) -> float:
        """0: the profile alone. 1: many measurements, predicted well."""
        own = self._lines.get((tp_size, phase))
        return own.confidence if own else 0.0

    def _line_of(self, tp_size: int, phase: Phase) -> tuple[float, float]:
        """(factor, offset in ms)."""
        if (found := self._applied.get((tp_size, phase))) is None:
            own = self._lines.get((tp_size, phase))
            mine = own.weight / (own.weight + 1) if own else 0.0
            factor, share = (own.factor, own.share) if own else (1.0, 0.0)
            others = [(o.confidence, o) for o in self._others(tp_size, phase)]
            total = sum(c for c, _ in others)
            lent = max((c for c, _ in others), default=0.0) if total else 0.0
            borrowed_factor = 1 + lent * (sum(c * o.factor for c, o in others) / total - 1) if total else 1.0
            borrowed_share = lent * sum(c * o.share for c, o in others) / total if total else 0.0
            factor = mine * factor + (1 - mine) * borrowed_factor
            share = mine * share + (1 - mine) * borrowed_share
            found = self._applied[tp_size, phase] = (factor, share * self._step(tp_size, phase))
        return found

    def _apply(self, tp_size: int, phase: Phase, ms: float) -> float:
        factor, offset = self._applied.get((tp_size, phase)) or self._line_of(tp_size, phase)
        # A negative offset must not make a short step free.
        return max(factor * ms + offset, self.bounds.factor_min * ms)

    @property
    def name(self) -> str:
        return str(getattr(self.base, "name", "?"))

    @property
    def origin(self) -> str:
        """Of the base; where that was corrected, also how sure the correction is."""
        return f"{self.base.origin}, corrected by {self.steps} timings, confidence {self.overall:.0%}" if self.steps else self.base.origin

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        return self.base.tp_sizes

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0, sequences: int = 1) -> float:
        if sequences > 1 and self._profile:
            return self._apply(tp_size, Phase.PREFILL, self._profile.prefill_ms(tp_size, chunk, ctx, sequences))
        return self._apply(tp_size, Phase.PREFILL, self.base.prefill_ms(tp_size, chunk, ctx))

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return self._apply(tp_size, Phase.DECODE, self.base.decode_ms(tp_size, batch, ctx))

    def decode_ms_many(self, tp_size: int, batch: Any, ctx: Any) -> Any:
        assert self._profile, "arrays need a base that is a Profile"
        ms = self._profile.decode_ms_many(tp_size, batch, ctx)
        factor, offset = self._line_of(tp_size, Phase.DECODE)
        return np.maximum(factor * ms + offset, self.bounds.factor_min * ms)

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int, cached: int = 0) -> float:
        """By its own correction once there are measurements; before, by those of its two parts."""
        if cached and self._profile:
            ms = self._profile.mixed_ms(tp_size, chunk, batch, ctx, cached)
        else:
            ms = self.base.mixed_ms(tp_size, chunk, batch, ctx)
        if not chunk or not batch:
            return self._apply(tp_size, Phase.PREFILL if chunk else Phase.DECODE, ms)
        if (line := self._lines.get((tp_size, Phase.MIXED))) and line.weight:
            return self._apply(tp_size, Phase.MIXED, ms)
        parts = self.base.prefill_ms(tp_size, chunk, cached) + self.base.decode_ms(tp_size, batch, ctx)
        now = self.prefill_ms(tp_size, chunk, cached) + self.decode_ms(tp_size, batch, ctx)
        return ms if now == parts else ms * now / parts

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        """As `FlipCost`, where the base is a profile: KV that is computed again takes what prefill really takes."""
        assert self._profile, "the cost of flips needs a base that is a Profile"
        parts = self._profile.flip_parts(resident_tokens, mode, from_tp, to_tp)
        if parts.kv is not KvFate.RECOMPUTED:
            return parts.pause_ms
        now, before = (model.prefill_ms(to_tp, TYPICAL_STREAM_TOKENS) for model in (self, self._profile))
        return parts.fixed_ms + parts.kv_ms * now / before

    def load_ms(self, tokens: int, tp_size: int) -> float | None:
        """As `KvLoad`: by the base, since no step says anything of it."""
        return self._profile.load_ms(tokens, tp_size) if self._profile else None

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return self.base.kv_capacity_tokens(tp_size, resident_tp)
