"""What a front saw of each tier since its last report: arrivals, lengths, latencies, who met their targets. No clock of its own."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from nitsum.length_sketch import GAMMA, Sketch
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.types.v1 import types_pb2


def message(s: Sketch) -> types_pb2.LengthSketch:
    """Of a sketch that counts whole values."""
    return types_pb2.LengthSketch(gamma=GAMMA, buckets={k: int(n) for k, n in s.buckets.items()}, zero_count=int(s.zeros), sum=s.total)


COUNTS = ("arrivals", "finished", "met_ttft", "met_tpot", "met_all", "refused", "failed", "moves")
SKETCHES = ("prompt_tokens", "output_tokens", "ttft_ms", "tpot_ms")


@dataclass
class TierWindow:
    counts: Counter[str] = field(default_factory=Counter)
    sketches: dict[str, Sketch] = field(default_factory=lambda: {name: Sketch() for name in SKETCHES})


class Demand:
    """`in_flight` outlives a window, the rest does not."""

    def __init__(self) -> None:
        self.windows: dict[str, TierWindow] = {}
        self.in_flight: Counter[str] = Counter()

    def _of(self, tier: str) -> TierWindow:
        return self.windows.setdefault(tier, TierWindow())

    def arrived(self, tier: str, prompt_tokens: int) -> None:
        w = self._of(tier)
        w.counts["arrivals"] += 1
        w.sketches["prompt_tokens"].add(prompt_tokens)
        self.in_flight[tier] += 1

    def moved(self, tier: str) -> None:
        self._of(tier).counts["moves"] += 1

    def left(self, tier: str) -> None:
        """The client went away."""
        self.in_flight[tier] -= 1

    def refused(self, tier: str, status: int) -> None:
        """A client's own mistake (400) is neither refused nor failed."""
        self.in_flight[tier] -= 1
        if status != 400:
            self._of(tier).counts["refused" if status == 429 else "failed"] += 1

    def finished(self, tier: types_pb2.Tier, output_tokens: int, ttft_ms: float, tpot_ms: float) -> None:
        """tpot_ms: mean over the tokens after the first; 0 with at most one token."""
        self.in_flight[tier.name] -= 1
        w = self._of(tier.name)
        in_ttft, in_tpot = not tier.ttft_ms or ttft_ms <= tier.ttft_ms, not tier.tpot_ms or tpot_ms <= tier.tpot_ms
        w.counts.update({"finished": 1, "met_ttft": int(in_ttft), "met_tpot": int(in_tpot), "met_all": int(in_ttft and in_tpot)})
        w.sketches["output_tokens"].add(output_tokens)
        w.sketches["ttft_ms"].add(ttft_ms)
        if output_tokens > 1:
            w.sketches["tpot_ms"].add(tpot_ms)

    def report(
        self, pool: types_pb2.PoolRef, tiers: list[str], window_s: float, running: Iterable[tuple[str, int]] = ()
    ) -> gateway_pb2.DemandReport:
        """Ends the window. Every tier of the pool has a row, so that silence is seen as no demand. `running`: tier of each stream that has
        tokens, and how many."""
        rows, made = [], dict[str, Sketch]()
        for tier, tokens in running:
            made.setdefault(tier, Sketch()).add(tokens)
        for tier in dict.fromkeys([*tiers, *self.windows, *(t for t, n in self.in_flight.items() if n)]):
            w = self.windows.get(tier, TierWindow())
            rows.append(
                gateway_pb2.TierDemand(
                    pool=pool,
                    tier=tier,
                    arrivals_squared=float(w.counts["arrivals"] ** 2),
                    in_flight=max(self.in_flight[tier], 0),
                    running_tokens=message(made.get(tier, Sketch())),
                    **{name: w.counts[name] for name in COUNTS},  # type: ignore[arg-type]
                    **{name: message(w.sketches[name]) for name in SKETCHES},  # type: ignore[arg-type]
                )
            )
        self.windows = {}
        return gateway_pb2.DemandReport(window_s=window_s, tiers=rows)
