"""From gateways' windows to TierDemand: exponentially weighted counts, with the uncertainty of a Poisson count."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from nitsum.demand import TierDemand
from nitsum.length_sketch import Sketch, whole

LENGTHS = 0.1
"""Part of the rates' decay: lengths change slower, and a quiet tier should still know its own."""


@dataclass(frozen=True)
class Window:
    """What one gateway saw of one tier in `seconds` up to `end`."""

    pool: str
    tier: str
    end: float
    seconds: float
    arrivals: int
    arrivals_squared: float = 0.0
    in_flight: int = 0
    prompt: tuple[Mapping[int, float], int, float] = ({}, 0, 0.0)
    """Buckets, zeros, sum, as in LengthSketch."""
    output: tuple[Mapping[int, float], int, float] = ({}, 0, 0.0)
    running: Mapping[int, float] = field(default_factory=dict)
    """Streams by the bucket of the tokens that they have made, at its end."""
    gateway: str = ""


@dataclass
class _Tier:
    seconds: dict[str, float] = field(default_factory=dict)
    arrivals: dict[str, float] = field(default_factory=dict)
    """By gateway, as are the two around it."""
    squared: dict[str, float] = field(default_factory=dict)
    at: float = 0.0
    in_flight: dict[str, int] = field(default_factory=dict)
    prompt: Sketch = field(default_factory=Sketch)
    output: Sketch = field(default_factory=Sketch)
    running: dict[str, Mapping[int, float]] = field(default_factory=dict)
    usual: dict[str, float] = field(default_factory=dict)
    """How many are running on average, by gateway: as many are among `output`, as they ended in what that has seen and began before."""
    frozen: TierDemand | None = None


class DemandEstimator:
    """One for all pools. Windows of several gateways add up; a gateway that falls silent stops counting as its time decays."""

    def __init__(self, half_life_s: float = 10.0) -> None:
        self.half_life_s = half_life_s
        self._tiers: dict[tuple[str, str], _Tier] = {}

    def observe(self, w: Window) -> None:
        t = self._tiers.setdefault((w.pool, w.tier), _Tier(at=w.end))
        factor = 0.5 ** (max(w.end - t.at, 0.0) / self.half_life_s)
        t.at = max(t.at, w.end)
        t.seconds = {g: s * factor for g, s in t.seconds.items() if s * factor > 1e-3}
        t.arrivals, t.squared = ({g: n * factor for g, n in of.items() if g in t.seconds} for of in (t.arrivals, t.squared))
        t.in_flight = {g: n for g, n in t.in_flight.items() if g in t.seconds}
        t.running = {g: n for g, n in t.running.items() if g in t.seconds}
        t.usual = {g: n for g, n in t.usual.items() if g in t.seconds}
        for of, new in ((t.seconds, w.seconds), (t.arrivals, float(w.arrivals)), (t.squared, w.arrivals_squared)):
            of[w.gateway] = of.get(w.gateway, 0.0) + new
        t.in_flight[w.gateway] = w.in_flight
        for sketch, (buckets, zeros, total) in ((t.prompt, w.prompt), (t.output, w.output)):
            sketch.decay(factor**LENGTHS)
            sketch.merge(buckets, zeros, total)
        runs, slow = float(sum(w.running.values())), 0.5 ** (w.seconds * LENGTHS / self.half_life_s)
        # What ran when a gateway's first report began is usual: a new leader would take long lives that it meets halfway for new streams.
        usual = t.usual.get(w.gateway, max(runs - w.arrivals, 0.0))
        t.usual[w.gateway] = usual * slow + runs * (1 - slow)
        t.running[w.gateway] = w.running

    def freeze(self, pool: str, now: float, tiers: Collection[str]) -> None:
        """`tiers`: those that flip now, whose queueing must not look like demand. The pool's others thaw."""
        for (p, tier), t in self._tiers.items():
            if p == pool:
                t.frozen = (t.frozen or replace(self._estimate(p, tier, t, now), frozen=True)) if tier in tiers else None

    def _estimate(self, pool: str, tier: str, t: _Tier, now: float) -> TierDemand:
        seconds = max(t.seconds.values(), default=0.0)
        if seconds <= 0:
            return TierDemand(pool, tier, 0.0, observed_at=t.at)
        arrivals = sum(t.arrivals.values())
        rate = arrivals / seconds
        output, output_cv = whole(t.output, self._unseen(t))
        return TierDemand(
            pool,
            tier,
            rate,
            math.sqrt(max(arrivals, 1.0)) / seconds,
            math.sqrt(self._dispersion(t, rate, seconds)) if rate > 0 else 1.0,
            t.prompt.mean,
            t.prompt.cv,
            output,
            output_cv,
            float(sum(t.in_flight.values())),
            t.at,
        )

    @staticmethod
    def _unseen(t: _Tier) -> dict[int, float]:
        """Running streams that are more than usual: the long ones of those that have begun in what `output` has seen."""
        more: dict[int, float] = {}
        for g, running in t.running.items():
            part = max(1 - t.usual[g] / max(sum(running.values()), 1e-9), 0.0)
            for k, n in running.items():
                more[k] = more.get(k, 0.0) + part * n
        return more

    @staticmethod
    def _dispersion(t: _Tier, rate: float, seconds: float) -> float:
        """Variance over mean of one-second counts; the CV of the gaps is its square root for a renewal process, in the long run.

        A gateway that sees the part p of the arrivals, at random, has counts of variance p^2 (variance - mean) + p mean.
        """
        rates = {g: n / seconds for g, n in t.arrivals.items()}
        excess = sum(t.squared.get(g, 0.0) / seconds - r**2 - r for g, r in rates.items())
        parts = sum((r / rate) ** 2 for r in rates.values())
        return max(1 + excess / parts / rate, 0.0)

    def estimate(self, now: float) -> tuple[TierDemand, ...]:
        """Sorted by pool and tier."""
        return tuple(t.frozen or self._estimate(p, tier, t, now) for (p, tier), t in sorted(self._tiers.items()))

    @property
    def tiers(self) -> tuple[tuple[str, str], ...]:
        """(pool, tier) of all that is known."""
        return tuple(self._tiers)

    def forget(self, pool: str) -> None:
        self._tiers = {k: t for k, t in self._tiers.items() if k[0] != pool}
