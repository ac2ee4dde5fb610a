"""What was learned of one (TP, phase)."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Bounds:
    """How far a correction may go, and how fast it forgets."""

    factor_min: float = 0.25
    factor_max: float = 4.0
    offset_share_max: float = 2.0
    """Of the smallest step that the base model knows at this TP and phase, either way."""
    memory: float = 200.0
    """Measurements after which old data weigh 1/e."""
    outlier_sigmas: float = 5.0
    window: int = 16
    """Recent measurements among which a change is looked for."""
    confident_after: float = 16.0
    """Accepted measurements that give half of full confidence."""


PRIOR_SIGMA = 0.5
"""Of the factor; and of the offset, in smallest steps."""
PULL_SIGMAS = 2.0
NOISE_MIN, NOISE_FIRST, NOISE_MAX = 0.02, 0.1, 0.3


class Line:
    """y/p = factor + share * (s/p): p is the prediction, s the smallest step. Two unknowns, 2x2 covariance, all in relative terms."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.recent: deque[tuple[float, float, bool]] = deque(maxlen=bounds.window)
        """(ratio, s/p, whether it lay well outside what was expected)."""
        self.accepted = self.rejected = 0
        self._reset()

    def _reset(self) -> None:
        self.factor, self.share = 1.0, 0.0
        self.cov = (PRIOR_SIGMA**2, 0.0, PRIOR_SIGMA**2)
        self.noise, self.error, self.weight = NOISE_FIRST, None, 0.0

    error: float | None
    weight: float
    """Accepted measurements, faded as the data are."""

    def add(self, ratio: float, h: float) -> None:
        """`ratio` = measured / predicted by the base model; `h` = smallest step / that prediction."""
        a, b, d = self.cov
        expected = self.factor + self.share * h
        spread = math.sqrt(max(a + 2 * b * h + d * h * h, 0.0) + self.noise**2)
        miss = abs(ratio - expected)
        self.recent.append((ratio, h, miss > PULL_SIGMAS * spread))
        if miss <= self.bounds.outlier_sigmas * spread:
            self.accepted += 1
            self._learn(ratio, h, expected)
        else:
            self.rejected += 1
        self._look_for_a_change()

    def _learn(self, ratio: float, h: float, expected: float) -> None:
        forget = 1 - 1 / self.bounds.memory
        # Forgetting without new information must not blow the covariance up: never above the prior.
        a, b, d = (x / forget for x in self.cov)
        if a > PRIOR_SIGMA**2 or d > PRIOR_SIGMA**2:
            a, b, d = self.cov
        residual = ratio - expected
        # Huber: what lies beyond these sigmas pulls no harder than they do.
        total = max(a + 2 * b * h + d * h * h, 0.0) + self.noise**2
        pull = math.copysign(min(abs(residual), PULL_SIGMAS * math.sqrt(total)), residual)
        ka, kd = (a + b * h) / total, (b + d * h) / total
        limits = self.bounds
        self.factor = min(max(self.factor + ka * pull, limits.factor_min), limits.factor_max)
        self.share = min(max(self.share + kd * pull, -limits.offset_share_max), limits.offset_share_max)
        self.cov = (a - ka * (a + b * h), b - ka * (b + d * h), d - kd * (b + d * h))
        after = abs(ratio - self.factor - self.share * h)
        step = max(0.05, 1 / (2 + self.weight))
        self.noise = min(max(math.sqrt((1 - step) * self.noise**2 + step * after**2), NOISE_MIN), NOISE_MAX)
        relative = abs(residual) / max(ratio, 1e-9)
        self.error = relative if self.error is None else self.error + step * (relative - self.error)
        self.weight = self.weight * forget + 1

    def _look_for_a_change(self) -> None:
        far = [(r, h) for r, h, outside in self.recent if outside]
        if len(self.recent) < self.bounds.window or len(far) < 0.75 * self.bounds.window:
            return
        middle = median(r for r, _ in far)
        agree = [(r, h) for r, h in far if abs(r - middle) <= 0.5 * middle]
        if len(agree) < 0.75 * len(far):
            return  # noise, not a change
        self._reset()
        self.factor = min(max(middle, self.bounds.factor_min), self.bounds.factor_max)
        self.recent.clear()
        for ratio, h in agree:
            self._learn(ratio, h, self.factor + self.share * h)

    @property
    def confidence(self) -> float:
        """Grows with data, falls with the error that is left."""
        return self.weight / (self.weight + self.bounds.confident_after) / (1 + 4 * (self.error or 0.0))
