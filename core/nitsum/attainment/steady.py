"""Where decode and prefill settle, and how they take turns."""

import math
from dataclasses import dataclass

from nitsum.attainment.prompts import Prompts

STEPS_GAP = 2e-4
"""Relative, of the share of prefill steps."""


@dataclass(frozen=True)
class Steady:
    """Where decode and prefill settle at a rate: what does not depend on bursts, nor on TTFT. Times in ms, `prefills` steps per ms."""

    batch: float
    tpot: float
    busy: float
    decode: float
    prefills: float
    prompts: Prompts
    sized: float = 0.0
    """Governed: the batch that steps were sized beside."""
    limit: str = ""


def steps(rate: float, decode: float, work: float, fixed: float) -> tuple[float, float]:
    """Per ms: (prefill steps, decode steps). What arrives in a step (Poisson) is prefilled in one step after it."""
    if not fixed:
        return rate, max(1 - rate * work, 0.0) / decode
    spare = 1 - rate * work
    if spare <= 0:
        return rate, 0.0
    after, grown = (1 - math.exp(-rate * decode)) / decode, rate * rate * work
    low, high = 0.0, min(rate, spare / fixed)
    steps = rate if rate < spare / fixed else high / 2
    for _ in range(16):
        # Root of ln(steps) - ln(free x after) - rate x lasting, which grows with steps: Newton's, within what is left by bisection.
        free = spare - steps * fixed
        above = math.log(steps / (free * after)) - min(rate * fixed + grown / steps, 50.0)
        if above > 0:
            high = steps
        elif steps >= rate:
            break
        else:
            low = steps
        step = steps - above / (1 / steps + fixed / free + grown / steps**2)
        near = abs(step - steps) <= STEPS_GAP * steps
        steps = step if low < step < high else (low + high) / 2
        if near or high - low <= STEPS_GAP * high:
            break
    return steps, max(spare - steps * fixed, 0.0) / decode
