"""What gateways measured over the last minute: rates, attainment, percentiles. Pure; `now` is Unix seconds."""

from collections import deque
from dataclasses import dataclass, field

from nitsum.demand_estimate import GAMMA, Sketch
from nitsum_api.gateway.v1 import gateway_pb2

WINDOW_S = 60.0
REPORTS_MAX = 4096
"""Of all gateways together."""


@dataclass
class TierFigures:
    """Sums over WINDOW_S, or over the time that reports cover where that is shorter."""

    arrivals: int = 0
    finished: int = 0
    met_all: int = 0
    seconds: float = 0.0
    ttft_ms: Sketch = field(default_factory=Sketch)
    tpot_ms: Sketch = field(default_factory=Sketch)

    @property
    def attainment(self) -> float | None:
        return self.met_all / self.finished if self.finished else None

    @property
    def rate(self) -> float:
        return self.arrivals / self.seconds if self.seconds else 0.0

    @property
    def goodput(self) -> float:
        return self.met_all / self.seconds if self.seconds else 0.0


class Figures:
    """Reports of all gateways, newest last; those older than WINDOW_S are dropped."""

    def __init__(self) -> None:
        self._reports: deque[gateway_pb2.DemandReport] = deque(maxlen=REPORTS_MAX)

    def add(self, report: gateway_pb2.DemandReport) -> None:
        if report.window_s > 0:
            self._reports.append(report)

    def tier(self, pool: str, tier: str, now: float) -> TierFigures:
        while self._reports and now - self._reports[0].window_end.ToNanoseconds() / 1e9 > WINDOW_S:
            self._reports.popleft()
        sums, seconds = TierFigures(), dict[str, float]()
        for report in self._reports:
            for t in report.tiers:
                if (t.pool.name, t.tier) != (pool, tier):
                    continue
                seconds[report.gateway_id] = seconds.get(report.gateway_id, 0.0) + report.window_s
                sums.arrivals, sums.finished, sums.met_all = (
                    sums.arrivals + t.arrivals,
                    sums.finished + t.finished,
                    sums.met_all + t.met_all,
                )
                for mine, theirs in ((sums.ttft_ms, t.ttft_ms), (sums.tpot_ms, t.tpot_ms)):
                    mine.merge(dict(theirs.buckets), theirs.zero_count, theirs.sum, theirs.gamma or GAMMA)
        # Gateways report side by side: the longest stretch is the time covered.
        sums.seconds = min(max(seconds.values(), default=0.0), WINDOW_S)
        return sums
