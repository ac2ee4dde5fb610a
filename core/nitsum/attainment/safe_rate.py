"""The search for the rate up to which a goal is met."""

import math
from dataclasses import dataclass

from nitsum.attainment.goal import Goal, Point
from nitsum.attainment.group import Group

MARGIN = 0.9
"""Of the rate found: the simulated engine's is rarely lower then."""


@dataclass(frozen=True)
class Safe:
    """`rate` requests/s; `binding` names what breaks just above it; `batch`: how many may run at once."""

    rate: float
    binding: str
    batch: int
    partly: float | None = None
    """Not None: `rate` is what a part of the requests would meet, which is more than this, the rate at which the goal's share does."""
    attained: tuple[float, float] = (1.0, 1.0)
    """Shares met at half of the rate, and at the rate."""


def binding_of(p: Point) -> str:
    return p.limit or ("TPOT" if p.tpot_share < p.ttft_share else "TTFT")


def safe(group: Group, goal: Goal) -> Safe:
    """The largest rate at which the goal's share is met, within 1 %. Rate 0 where even a lone request misses a target."""

    held = Point(1.0, 1.0, 0.0, 0.0, 0.0)
    broken = 1e-3, 0.0

    def misses(rate: float) -> bool:
        nonlocal held, broken
        p = group.at(rate, goal, held.batch, goal.share)
        if missed := p.share < goal.share:
            broken = rate, held.batch
        else:
            held = p
        return missed

    if misses(1e-3):
        return Safe(0.0, binding_of(group.at(1e-3, goal)), 0)
    low, high = 0.0, 0.25 / group.stock.stall * 1e3
    while not misses(high):
        low, high = high, high * 2
    for _ in range(20):
        if high - low <= 0.01 * high:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if misses(middle) else (middle, high)
    batch = math.ceil(1 + held.batch + 2 * held.batch_stddev)
    half, whole = (group.at(part * MARGIN * low, goal).share for part in (0.5, 1.0))
    binding = binding_of(group.at(broken[0], goal, broken[1]))
    return Safe(MARGIN * low, binding, min(batch, max(int(group.kv_batch), 1)), attained=(half, whole))
