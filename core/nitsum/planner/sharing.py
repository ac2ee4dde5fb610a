"""Which tiers may share a group, what must hold of each of them there, and among how many groups what comes is spread."""

from functools import lru_cache

from nitsum.attainment import Goal
from nitsum.demand import TierDemand
from nitsum.perf import StepTimeModel
from nitsum.planner.capacity import PRIOR_OUTPUT, PRIOR_PROMPT
from nitsum.pool import Tier

BATCH = 32
SPARED = 1.0
"""Of the misses that a tier's target allows, those that a plan counts on: the rest is for what estimates do not see."""
Sharing = tuple[tuple[str, Goal, str], ...]
"""Tiers that share a group: (tier, its goal there, the tier whose TTFT suffers)."""
MIXED_MAX = 3
"""Neighbouring tiers that may share groups, unless all do: more sorts of groups cost time and gain nothing."""


def goal_of(tier: Tier, members: tuple[Tier, ...] = ()) -> tuple[Goal, str]:
    """What must hold of a tier in a group that these share, and the tier whose TTFT suffers most there, if another.

    All decode in the same steps, so the strictest TPOT is everyone's; prompts wait for each other, but each has its own TTFT.
    """
    share = max(1 - SPARED * (1 - t.target) for t in (tier, *members))
    tpot = min((t.tpot_ms for t in (tier, *members) if t.tpot_ms is not None), default=None)
    guest = min((t for t in members if t.ttft_ms is not None and t != tier), key=lambda t: (t.ttft_ms, t.name), default=None)
    if guest is None or (tier.ttft_ms is not None and (guest.ttft_ms or 0.0) > tier.ttft_ms):
        return Goal(tier.ttft_ms, tpot, share), ""
    return Goal(tier.ttft_ms, tpot, share, guest.ttft_ms), guest.name


def work(d: TierDemand, model: StepTimeModel, tp_size: int) -> float:
    """Of a group's time, what a tier takes at a moderate batch; only compared with that of other tiers."""
    prompt, output = d.prompt_tokens_mean or PRIOR_PROMPT, d.output_tokens_mean or PRIOR_OUTPUT
    decode_ms = model.decode_ms(tp_size, BATCH, int(prompt + output / 2)) / BATCH
    return d.rate * (model.prefill_ms(tp_size, max(int(prompt), 1)) + output * decode_ms)


def crowd_of(groups: int, part: float) -> int:
    """Groups among which the arrivals of tiers are spread that make this part of the work; a power of 2, so as not to tremble."""
    return 1 << max(int(groups * part + 0.25).bit_length() - 1, 0)


@lru_cache(maxsize=256)
def runs_of(tiers: tuple[Tier, ...]) -> tuple[Sharing, ...]:
    """Runs of neighbours that may share groups."""
    runs = [
        tiers[first:last]
        for first in range(len(tiers))
        for last in range(first + 1, len(tiers) + 1)
        if last - first <= MIXED_MAX or last - first == len(tiers)
    ]
    return tuple(tuple((t.name, *goal_of(t, members)) for t in members) for members in runs)
