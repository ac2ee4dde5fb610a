"""From outcomes to the figures that people compare. Definitions:

Attainment of a tier: requests that met every SLO / requests offered; refused, failed and cut-off ones are misses. Requests beyond the
model's context are left out and counted apart. A one-token output has no TPOT, so it cannot miss one. Tiers without an SLO have no
attainment and stay out of totals. Goodput: those that met, per second of the workload. No warm-up is left out; after the last arrival the
fleet drains, so late ones count by their own latencies.
"""

import math
from collections.abc import Mapping
from typing import Any

from nitsum.pool import Pool, Tier
from nitsum.sim.result import Ending, Outcome, RunResult


def met(tier: Tier, o: Outcome) -> bool:
    if o.ending is not Ending.FINISHED or o.ttft_ms is None:
        return False
    in_ttft = tier.ttft_ms is None or o.ttft_ms <= tier.ttft_ms
    return in_ttft and (tier.tpot_ms is None or o.tpot_ms is None or o.tpot_ms <= tier.tpot_ms)


def met_all(pool: Pool, result: RunResult) -> int:
    """Requests that met every SLO, of tiers that have one."""
    tiers = {t.name: t for t in pool.tiers if not t.background}
    return sum(o.tier in tiers and met(tiers[o.tier], o) for o in result.outcomes)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def percentile(values: list[float], q: float) -> float | None:
    """Nearest rank: a value that occurred."""
    if not values:
        return None
    return round(sorted(values)[max(math.ceil(q * len(values)) - 1, 0)], 3)


def _latency(values: list[float]) -> dict[str, float | None]:
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}


def tier_figures(tier: Tier, outcomes: list[Outcome], duration_s: float) -> dict[str, Any]:
    good = sum(met(tier, o) for o in outcomes)
    judged = bool(outcomes) and not tier.background
    return {
        "goodput_rps": _round(good / duration_s) if judged else None,
        "attainment": _round(good / len(outcomes)) if judged else None,
        "offered_rps": _round(len(outcomes) / duration_s),
        "ttft_ms": _latency([o.ttft_ms for o in outcomes if o.ttft_ms is not None]),
        "tpot_ms": _latency([o.tpot_ms for o in outcomes if o.tpot_ms is not None]),
    }


def policy_figures(pool: Pool, result: RunResult, too_long: Mapping[str, int]) -> dict[str, Any]:
    by_tier: dict[str, list[Outcome]] = {t.name: [] for t in pool.tiers}
    for o in result.outcomes:
        by_tier[o.tier].append(o)
    judged = [(t, o) for t in pool.tiers if not t.background for o in by_tier[t.name]]
    good = sum(met(t, o) for t, o in judged)
    return {
        "goodput_rps": _round(good / result.duration_s) if judged else None,
        "attainment": _round(good / len(judged)) if judged else None,
        "offered_rps": _round(len(judged) / result.duration_s),
        "refused": sum(o.ending is Ending.REFUSED for o in result.outcomes),
        "failed": sum(o.ending is Ending.FAILED for o in result.outcomes),
        "too_long": sum(too_long.values()),
        "flips": result.flips,
        "gpus_max": result.gpus_max,
        "retractions": result.retractions,
        "tiers": {t.name: tier_figures(t, by_tier[t.name], result.duration_s) for t in pool.tiers},
    } | ({"note": result.note} if result.note else {})


def goodput_over_time(pool: Pool, result: RunResult, bin_s: float) -> dict[str, list[tuple[float, float, float]]]:
    """By tier: (from second, offered, met) in requests/s, by arrival."""
    bins = max(math.ceil(round(result.duration_s / bin_s, 6)), 1)  # equal parts of the duration: no empty one from rounding
    found = {t.name: [[0, 0] for _ in range(bins)] for t in pool.tiers if not t.background}
    tiers = {t.name: t for t in pool.tiers}
    for o in result.outcomes:
        if o.tier in found:
            cell = found[o.tier][min(int(o.arrived / bin_s), bins - 1)]
            cell[0] += 1
            cell[1] += met(tiers[o.tier], o)
    return {t: [(i * bin_s, n / bin_s, good / bin_s) for i, (n, good) in enumerate(cells)] for t, cells in found.items()}
