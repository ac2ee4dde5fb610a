"""Demand of a tier as the planner sees it: uncertain rate, burstiness, lengths."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TierDemand:
    """Estimate for the coming window. Rates are requests per second; lengths are tokens; `cv` is the coefficient of variation of arrivals,
    `..._cv` that of lengths."""

    pool: str
    tier: str
    rate: float
    rate_stddev: float = 0.0
    cv: float = 1.0
    prompt_tokens_mean: float = 0.0
    prompt_tokens_cv: float = 0.0
    output_tokens_mean: float = 0.0
    output_tokens_cv: float = 0.0
    in_flight: float = 0.0
    observed_at: float = 0.0
    """When the newest report in it was made; the planner treats old ones as stale."""
    frozen: bool = False
    """A flip of this tier is running: its own queueing must not cause the next flip."""
