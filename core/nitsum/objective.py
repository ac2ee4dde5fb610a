"""SLO-safe capacity of a group, and the goodput that a set of equal groups is expected to give to its tiers.

A group serves arrivals of rate r with prompt p and output n (means). Prefill takes the share rho = r * prefill(p) of its time; decode
steps of batch b stretch by 1 / (1 - rho). By Little's law b = r * n * tpot. TTFT: M/D/1 wait for prefill (DistServe, OSDI'24) + prefill
+ one step. The safe rate is the largest r at which the strictest TTFT and TPOT hold and the KV fits.
"""

from dataclasses import dataclass

from nitsum.demand import TierDemand
from nitsum.perf import StepTimeModel
from nitsum.pool import Tier


@dataclass(frozen=True)
class Load:
    """Mixture of the tiers that a group serves: rate in requests/s, mean lengths in tokens."""

    rate: float
    prompt: float
    output: float


@dataclass(frozen=True)
class Targets:
    """The strictest of the tiers that shall hold. None: no such target."""

    ttft_ms: float | None
    tpot_ms: float | None


@dataclass(frozen=True)
class Point:
    """Where a group stands at a rate."""

    batch: float
    ttft_ms: float
    tpot_ms: float
    binding: str
    """Which limit breaks here: TTFT, TPOT, KV, prefill; empty: none."""


def at_rate(model: StepTimeModel, tp_size: int, load: Load, targets: Targets, resident_tp: tuple[int, ...] = ()) -> Point:
    """The steady state at load.rate."""
    ctx = int(load.prompt + load.output / 2)
    prefill_ms = model.prefill_ms(tp_size, max(int(load.prompt), 1))
    rho = load.rate * prefill_ms / 1e3
    kv_tokens = model.kv_capacity_tokens(tp_size, resident_tp)
    batch_max = max(kv_tokens / max(load.prompt + load.output, 1.0), 0.0)
    if rho >= 0.95:
        return Point(batch_max, float("inf"), float("inf"), "prefill")
    batch, tpot = 1.0, 0.0
    for _ in range(60):  # monotone fixed point from below
        tpot = model.decode_ms(tp_size, max(round(batch), 1), ctx) / (1 - rho)
        grown = max(load.rate * load.output * tpot / 1e3, 1.0)
        if grown > batch_max:
            return Point(grown, float("inf"), tpot, "KV" if batch_max >= 1 else "KV (one request does not fit)")
        if grown <= batch + 0.5:
            break
        batch = grown
    ttft = prefill_ms * (1 + rho / (2 * (1 - rho))) + tpot
    binding = ""
    if targets.tpot_ms is not None and tpot > targets.tpot_ms:
        binding = "TPOT"
    elif targets.ttft_ms is not None and ttft > targets.ttft_ms:
        binding = "TTFT"
    return Point(batch, ttft, tpot, binding)


def safe_rate(
    model: StepTimeModel, tp_size: int, load: Load, targets: Targets, resident_tp: tuple[int, ...] = ()
) -> tuple[float, str, int]:
    """(largest safe rate in requests/s, what binds just above it, batch at it). (0, binding, 0) where even one request breaks a target."""

    def point(rate: float) -> Point:
        return at_rate(model, tp_size, Load(rate, load.prompt, load.output), targets, resident_tp)

    lone = point(1e-6)
    if lone.binding:
        return 0.0, lone.binding, 0
    low, high = 0.0, 1.0
    while not point(high).binding and high < 1e5:
        low, high = high, high * 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if point(middle).binding else (middle, high)
    return low, point(high).binding, max(int(point(low).batch), 1)


def mixture(demands: tuple[TierDemand, ...]) -> Load:
    """Rates add up; lengths are means weighted by rate. Tiers without data count with modest lengths, so that nothing divides by zero."""
    rate = sum(d.rate for d in demands)
    if rate <= 0:
        known = [d for d in demands if d.prompt_tokens_mean > 0]
        return Load(
            0.0, max((d.prompt_tokens_mean for d in known), default=256.0), max((d.output_tokens_mean for d in known), default=128.0)
        )
    return Load(
        rate,
        sum(d.rate * (d.prompt_tokens_mean or 256.0) for d in demands) / rate,
        sum(d.rate * (d.output_tokens_mean or 128.0) for d in demands) / rate,
    )


def strictest(tiers: tuple[Tier, ...]) -> Targets:
    return Targets(
        min((t.ttft_ms for t in tiers if t.ttft_ms is not None), default=None),
        min((t.tpot_ms for t in tiers if t.tpot_ms is not None), default=None),
    )
