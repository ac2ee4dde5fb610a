"""The true demand of the coming window, for the oracle alone."""

import math

import numpy as np

from nitsum.demand import TierDemand
from nitsum.sim.arrivals import Traffic


class Foresight:
    def __init__(self, pool: str, tiers: tuple[str, ...], traffic: Traffic) -> None:
        self.pool = pool
        self._columns = {}
        for tier in tiers:
            mine = [r for r in traffic.requests if r.tier == tier]
            self._columns[tier] = tuple(
                np.asarray(c) for c in ([r.arrived for r in mine], [r.prompt for r in mine], [r.output for r in mine])
            )

    def __call__(self, now: float, window_s: float) -> tuple[TierDemand, ...]:
        found = []
        for tier, (at, prompt, output) in sorted(self._columns.items()):
            a, b = int(np.searchsorted(at, now)), int(np.searchsorted(at, now + window_s))
            if a == b:
                found.append(TierDemand(self.pool, tier, 0.0, observed_at=now))
                continue
            rate = float(b - a) / window_s
            counts = np.bincount((at[a:b] - now).astype(int), minlength=max(math.ceil(window_s), 1))
            p, o = prompt[a:b], output[a:b]
            found.append(
                TierDemand(
                    self.pool,
                    tier,
                    rate,
                    0.0,
                    math.sqrt(float(counts.var()) / rate),
                    float(p.mean()),
                    float(p.std() / p.mean()),
                    float(o.mean()),
                    float(o.std() / o.mean()),
                    observed_at=now,
                )
            )
        return tuple(found)
