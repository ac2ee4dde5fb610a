"""What gateways measured over the last minute: rates, attainment, percentiles. Pure; `now` is Unix seconds."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from nitsum.length_sketch import Sketch
from nitsum_api.gateway.v1 import gateway_pb2

WINDOW_S = 60.0
REPORTS_MAX = 4096
"""Of all gateways together, of one tier."""
FRESH_S = 2.0


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
    """Reports of all gateways by pool and tier, newest last; those older than WINDOW_S are dropped."""

    def __init__(self) -> None:
        self._reports: dict[tuple[str, str], deque[tuple[float, str, float, gateway_pb2.TierDemand]]] = {}
        """End, gateway, seconds, counts."""
        self._sums: dict[tuple[str, str], tuple[float, TierFigures]] = {}

    def add(self, report: gateway_pb2.DemandReport) -> None:
        end = report.window_end.ToNanoseconds() / 1e9
        for t in report.tiers if report.window_s > 0 else ():
            reports = self._reports.setdefault((t.pool.name, t.tier), deque(maxlen=REPORTS_MAX))
            reports.append((end, report.gateway_id, report.window_s, t))

    def keep(self, pools: Iterable[str]) -> None:
        """Forgets the others."""
        self._reports = {k: r for k, r in self._reports.items() if k[0] in pools}
        self._sums = {k: s for k, s in self._sums.items() if k in self._reports}

    def tier(self, pool: str, tier: str, now: float) -> TierFigures:
        """At most FRESH_S old: what many gateways report is not added up anew for every status of every cycle."""
        at, sums = self._sums.get((pool, tier), (0.0, TierFigures()))
        if not 0 <= now - at < FRESH_S:
            sums = self._added(self._reports.get((pool, tier), deque()), now)
            self._sums[pool, tier] = now, sums
        return sums

    def _added(self, reports: deque[tuple[float, str, float, gateway_pb2.TierDemand]], now: float) -> TierFigures:
        while reports and now - reports[0][0] > WINDOW_S:
            reports.popleft()
        sums, seconds = TierFigures(), dict[str, float]()
        for _, gateway, window_s, t in reports:
            seconds[gateway] = seconds.get(gateway, 0.0) + window_s
            sums.arrivals, sums.finished, sums.met_all = sums.arrivals + t.arrivals, sums.finished + t.finished, sums.met_all + t.met_all
            for mine, theirs in ((sums.ttft_ms, t.ttft_ms), (sums.tpot_ms, t.tpot_ms)):
                mine.merge(dict(theirs.buckets), theirs.zero_count, theirs.sum, theirs.gamma)
        # Gateways report side by side: the longest stretch is the time covered.
        sums.seconds = min(max(seconds.values(), default=0.0), WINDOW_S)
        return sums
