"""Lengths as distributions, read at a few quantiles."""

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

QUANTILES = ((0.25, 0.5), (0.65, 0.3), (0.875, 0.15), (0.97, 0.04), (0.995, 0.01))
"""(quantile at which a length is read, share of the requests that it stands for)."""
ZS = tuple((NormalDist().inv_cdf(q), w) for q, w in QUANTILES)
Points = tuple[tuple[float, float], ...]
"""(value, share of requests)"""


@dataclass(frozen=True)
class Lengths:
    """Tokens. `cv`: standard deviation over mean; 0: all are equal."""

    mean: float
    cv: float = 0.0

    @cached_property
    def sigma(self) -> float:
        return math.sqrt(math.log1p(self.cv**2))

    @property
    def tail(self) -> float:
        """Mean square over that of `points`: a few points have not the spread of the whole."""
        points = self.points()
        return math.exp(self.sigma**2) / (sum(x * x * w for x, w in points) / max(self.mean, 1.0) ** 2)

    def points(self) -> tuple[tuple[float, float], ...]:
        """(tokens, share of requests)."""
        if not (sigma := self.sigma):
            return ((max(self.mean, 1.0), 1.0),)
        drawn = [(math.exp(sigma * z - sigma**2 / 2), w) for z, w in ZS]
        scale = self.mean / sum(x * w for x, w in drawn)  # a few points have not the mean of the whole
        return tuple((max(x * scale, 1.0), w) for x, w in drawn)


def running_length(prompt: float, output: Lengths) -> float:
    """Mean tokens of a stream that runs, prompt and what is made: it is seen for as long as its output takes, and long ones longest."""
    return prompt + output.mean * (1 + output.cv**2) / 2
