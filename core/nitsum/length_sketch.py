"""Lengths as a weighted DDSketch histogram (VLDB'19), and what those that have not ended yet say of them.

No library's, for counts must fade with time and be read bucket by bucket (variance, Kaplan and Meier, gateways' reports): Apache
DataSketches' KLL and t-digest have neither weights that fade nor buckets, and KLL draws lots, so that equal reports would not give equal
plans. Datadog's `ddsketch` has the same buckets, but no door to scale or to list them: all but `add` and `quantile` would reach into its
private fields.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

GAMMA = 1.02
"""Bucket k holds values in (GAMMA^(k-1), GAMMA^k]: 1 % relative error."""
LOG_GAMMA = math.log(GAMMA)
BUCKET_MIN, BUCKET_MAX = -200, math.ceil(math.log(1e7) / LOG_GAMMA)
"""Smaller and larger values count as 0.02 and 10^7, so a sketch never has more than about 1,000 buckets."""
MIDDLE = 2 / (1 + GAMMA)
"""From the upper end of a bucket to its middle."""
CV_PRIOR, SEEN_PRIOR = 1.0, 5.0
"""Few values do not show their tail: so many more count with this coefficient of variation."""
FAINT, DROPPED = 1e-3, 1e-6
"""Values that count on however long none comes; part of all that a bucket must hold to be kept."""


def bucket(value: float) -> int:
    """Of a value above 0."""
    return min(max(math.ceil(math.log(value) / LOG_GAMMA), BUCKET_MIN), BUCKET_MAX)


def ours(buckets: Mapping[int, float], gamma: float) -> Mapping[int, float]:
    """Counts by our buckets. Another's beyond them count in the last one; a `gamma` that is none, as 0 where it is not said, is taken for
    GAMMA."""
    scale = math.log(gamma) / LOG_GAMMA if gamma != GAMMA and 1 < gamma < math.inf else 1.0
    if not buckets or (scale == 1 and min(buckets) >= BUCKET_MIN and max(buckets) <= BUCKET_MAX):
        return buckets
    found: dict[int, float] = {}
    for k, n in buckets.items():
        mine = min(max(math.ceil(k * scale), BUCKET_MIN), BUCKET_MAX)
        found[mine] = found.get(mine, 0.0) + n
    return found


@dataclass
class Sketch:
    """`count` has the zeros in it, which have no bucket."""

    buckets: dict[int, float] = field(default_factory=dict)
    count: float = 0.0
    total: float = 0.0

    def add(self, value: float, n: int = 1) -> None:
        self.count += n
        if value > 0:
            k = bucket(value)
            self.buckets[k] = self.buckets.get(k, 0) + n
            self.total += n * value

    @property
    def zeros(self) -> float:
        return max(self.count - sum(self.buckets.values()), 0.0)

    def merge(self, buckets: Mapping[int, float], zeros: float, total: float, gamma: float = GAMMA) -> None:
        for k, n in ours(buckets, gamma).items():
            self.buckets[k] = self.buckets.get(k, 0.0) + n
        self.count += sum(buckets.values()) + zeros
        self.total += total

    def decay(self, factor: float) -> None:
        """Down to FAINT, not to nothing: what was known of a quiet tier's lengths would be lost to the first stream that comes."""
        factor = max(factor, min(FAINT / self.count, 1.0)) if self.count else factor
        self.count *= factor
        self.total *= factor
        least = DROPPED * self.count
        self.buckets = {k: v for k, n in self.buckets.items() if (v := n * factor) > least}

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """Upper end of the bucket in which the q-quantile lies; 0 without data."""
        left = q * self.count - (self.count - sum(self.buckets.values()))
        for k in sorted(self.buckets):
            left -= self.buckets[k]
            if left <= 0:
                return GAMMA**k
        return GAMMA ** max(self.buckets) if self.buckets else 0.0

    @property
    def cv(self) -> float:
        """Standard deviation over mean; 0 without data."""
        if not self.total or not self.count:
            return 0.0
        squares = sum(n * (MIDDLE * GAMMA**k) ** 2 for k, n in self.buckets.items())
        return _shrunk(squares / self.count / self.mean**2 - 1, self.count)


def _shrunk(squared: float, seen: float) -> float:
    return math.sqrt((seen * max(squared, 0.0) + SEEN_PRIOR * CV_PRIOR**2) / (seen + SEEN_PRIOR))


def whole(ended: Sketch, running: Mapping[int, float]) -> tuple[float, float]:
    """(mean, coefficient of variation) of the lengths of streams of which some have `ended`, and others have come to `running` (streams by
    bucket) and go on: long ones end last, so those that have ended are the short ones (Kaplan and Meier, JASA 1958).

    What is left beyond the longest: those live on as long as streams do on average, but no longer than they have.
    """
    cut = sum(running.values())
    if cut < 1e-3:
        return ended.mean, ended.cv
    made = ended.total + sum(n * MIDDLE * GAMMA**k for k, n in running.items())
    at_risk, left, value, mean, square = ended.count + cut, 1.0, 0.0, 0.0, 0.0
    left -= ended.zeros / at_risk
    at_risk -= ended.zeros
    for k in sorted({*ended.buckets, *running}):
        value = MIDDLE * GAMMA**k
        if (ends := ended.buckets.get(k, 0.0)) and at_risk > 0:
            part = left * min(ends / at_risk, 1.0)
            mean, square, left = mean + part * value, square + part * value**2, left - part
        at_risk -= ends + running.get(k, 0.0)
    more = min(made / (ended.count + 1), value)
    mean, square = mean + left * (value + more), square + left * ((value + more) ** 2 + more**2)
    return mean, _shrunk(square / mean**2 - 1 if mean > 0 else 0.0, ended.count)
