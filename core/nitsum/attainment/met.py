"""Shares of the requests whose TTFT and TPOT are met, where prefill and decode have settled."""

import math
from statistics import NormalDist

from nitsum.attainment.lengths import Points
from nitsum.attainment.prompts import Prompts

BURST = 0.5
"""Of the others in a request's own burst: how many are prefilled after it, not with it."""
SHARED = 0.35
"""Power of the number of groups by which the wait for prefill falls; 1 if routers saw all there is to do."""
SPREAD, CONVEX, TAIL, MIXED_TAIL = 1.35, 0.8, 1.5, 1.3
"""Fitted to the simulated engine: load comes in waves, and a step's time grows faster than the load that it is taken at."""


def _lognormal(x: float, mean: float, variance: float) -> float:
    """Share below x. Stalls only add: what is above the mean reaches further than what is below."""
    sigma2 = math.log1p(variance / mean**2)
    if sigma2 < 1e-12:
        return float(mean <= x)
    return 0.5 + 0.5 * math.erf((math.log(x / mean) + sigma2 / 2) / math.sqrt(2 * sigma2))


def _seen(busy: float, rush: float) -> float:
    """Share of arrivals that find work before them: more than the share of time if they come in bursts, less if they are spread evenly
    (GI/M/1, gamma gaps)."""
    seen = busy
    if rush != 1 and 0 < busy < 1:
        for _ in range(20):
            seen = (1 + (1 - seen) * rush / busy) ** (-1 / rush)
    return seen


def full(room: float, spread: float, life: float, rush: float, target: float | None) -> float:
    """Share that waits too long for KV: finds no room, and as much does not end in time (M/M/N: each that runs lasts a life).
    `room`: for so many more; `spread` of those that run."""
    over = 1 - NormalDist().cdf(room / max(spread, 1e-6))
    lives = (target or math.inf) / (life * max(rush, 1.0))
    return over * math.exp(-room * lives)


def ttft_share(
    r: float,
    target: float | None,
    door: float,
    decode: float,
    busy: float,
    rush: float,
    crowd: int,
    prompts: Prompts,
    each: Points,
    fixed: float,
    mixed: bool,
) -> float:
    if target is None:
        return 1.0
    served = prompts.own if mixed else prompts.stall
    cs2 = (prompts.own2 if mixed else prompts.stall2) / served**2 - 1
    tail = served * (rush + max(cs2, 0.0)) / (2 * max(1 - r * served, 0.03)) * (MIXED_TAIL if mixed else (1 + busy) * TAIL)
    tail = tail / crowd**SHARED + fixed / 2
    seen = _seen(busy, rush)
    share = 0.0
    for own, weight in each:
        room = target - own - door
        # An idle engine starts at once; one that decodes ends its step first, uniformly; else work is ahead.
        idle = max(min(room / decode, 1.0), 0.0) if room > 0 else 0.0
        behind = 1 - math.exp(-(room - decode / 2) / tail) if room > decode / 2 else 0.0
        share += weight * ((1 - seen) * idle + seen * behind)
    return share


def tpot_share(
    r: float,
    target: float,
    tpot: float,
    wider: float,
    fixed: float,
    busy: float,
    rush: float,
    prompts: Prompts,
    lives: Points,
    late: float,
) -> float:
    """`wider`: by how much slower decode is beside a batch that is larger by what it varies over a life."""
    wide = wider / max(1 - busy, 0.03)
    stall2 = prompts.stall2 + 2 * prompts.stall * fixed + fixed**2
    # Of one step. A stall lasts while more arrive: as the busy period of a queue, hence the division.
    stalls2 = r * tpot * stall2 * rush / max(1 - busy, 0.03) ** 2
    burst = BURST * max(rush - 1, 0.0) / 2 * (prompts.stall + fixed) / max(1 - busy, 0.03)
    share = 0.0
    for steps, weight in lives:
        spread2 = SPREAD**2 * (wide**2 + stalls2 / steps)
        share += weight * _lognormal(target, tpot + (burst + late) / steps + CONVEX * spread2 / tpot, spread2)
    return share
