"""The analytic safe rate against the simulated engine, over a grid of lengths, targets, burstiness, TP and governor.

What is asserted are the bounds of the error; `python -m tests.golden.test_capacity` prints it case by case, over more cases.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from nitsum.attainment import Goal, Group, Lengths, safe
from nitsum.perf.profile import load_shipped
from nitsum.sim.arrivals import synthetic
from nitsum.sim.engine import Engine, EngineLimits, Happened, Seq
from nitsum.sim.steptimes import StepTimes
from nitsum.sim.workload import Length, Synthetic

MODEL = load_shipped("llama-3.1-8b-instruct.h100_sxm")
RESIDENT = (1, 2, 4, 8)
TIMES = {tp: StepTimes(MODEL, tp) for tp in RESIDENT}


@dataclass(frozen=True)
class Case:
    """`prompt` and `output`: (mean, cv)."""

    tp_size: int
    prompt: tuple[float, float]
    output: tuple[float, float]
    cv: float
    ttft_ms: float | None
    tpot_ms: float | None
    governed: bool = False

    @property
    def goal(self) -> Goal:
        return Goal(self.ttft_ms, self.tpot_ms, 0.95)


def lengths(mean: float, cv: float) -> Lengths:
    return Lengths(mean, cv)


def chunk(c: Case) -> int | None:
    """As plans size it."""
    if not c.governed or c.tpot_ms is None:
        return None
    return Group(MODEL, c.tp_size, lengths(*c.prompt), lengths(*c.output), resident_tp=RESIDENT).chunk(c.tpot_ms)


def attained(c: Case, rate: float, requests: int, mixed: int | None) -> float:
    """Share of the requests that meet both targets, after a fifth of the time."""
    duration = max(requests / rate, 60.0)
    spec = Synthetic(c.cv, Length(*c.prompt), Length(*c.output))
    at, prompt, output = synthetic(spec, duration, rate, np.random.default_rng(7))
    engine = Engine(TIMES[c.tp_size], MODEL.kv_capacity_tokens(c.tp_size, RESIDENT), EngineLimits(mixed_tokens=mixed))
    first, last = np.zeros(len(at)), np.zeros(len(at))

    def run(until: float) -> None:
        while engine.next_at <= until:
            now = engine.next_at
            for what, seq in engine.advance():
                (first if what is Happened.FIRST else last)[seq.rid] = now

    for i in range(len(at)):
        run(at[i])
        engine.submit(Seq(i, int(prompt[i]), int(output[i]), int(output[i])), float(at[i]))
    run(1e12)
    met = np.ones(len(at), dtype=bool)
    if c.ttft_ms is not None:
        met &= (first - at) * 1e3 <= c.ttft_ms
    if c.tpot_ms is not None:
        met &= (output == 1) | ((last - first) * 1e3 <= c.tpot_ms * (output - 1))
    return float(met[at > 0.2 * duration].mean())


def safe_rate(c: Case) -> tuple[float, int | None]:
    prompt, output = lengths(*c.prompt), lengths(*c.output)
    found = safe(Group(MODEL, c.tp_size, prompt, output, c.cv**2, c.governed, None, RESIDENT), c.goal)
    return found.rate, chunk(c)


LEAST, STEP, STEPS = 0.2, 1.3, 6
"""requests/s at which the search begins at least; how it goes on, up to STEPS times."""
FURTHEST = STEP**STEPS


def simulated_rate(c: Case, guess: float, mixed: int | None, requests: int) -> float:
    """The largest rate that is attained, within 5 %; FURTHEST times the guess where there is none up to there."""
    low = high = guess
    while high < 0.99 * FURTHEST * guess and attained(c, high, requests, mixed) >= 0.95:
        low, high = high, high * STEP
    if high >= 0.99 * FURTHEST * guess and attained(c, high, requests, mixed) >= 0.95:
        return high
    while low == high or (low > 0.05 * guess and attained(c, low, requests, mixed) < 0.95):
        low, high = low / STEP, low
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if attained(c, middle, requests, mixed) >= 0.95 else (low, middle)
    return low


def grid(tps: tuple[int, ...], targets: tuple[tuple[float | None, float | None], ...]) -> Iterator[Case]:
    shapes = (
        ((1000, 0.8), (200, 1.0)),
        ((4000, 1.0), (300, 0.8)),
        ((200, 0.5), (400, 0.5)),
        ((2000, 0), (100, 0)),
        ((120, 0.8), (30, 0.8)),
    )
    for tp, (prompt, output), cv, (ttft, tpot), governed in itertools.product(tps, shapes, (1.0, 2.0), targets, (False, True)):
        if not governed or tpot is not None:
            yield Case(tp, prompt, output, cv, ttft, tpot, governed)


CASES = [
    *(c for c in grid((1, 4), ((500, 20), (1000, 40))) if c.cv == 1.0 or c.prompt[0] == 1000),
    # Long prompts, and KV that is full long before the time is.
    *(Case(tp, (12000, 0.7), (340, 0.7), 1.0, 10_000, 40, True) for tp in (1, 2, 4)),
    *(Case(tp, (1240, 1.0), (205, 0.8), 1.0, 10_000, 100, governed) for tp in (1, 4) for governed in (False, True)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_safe_rate_is_safe_and_not_far_too_low(case: Case) -> None:
    """At the rate said most meet their targets; at twice that rate, clearly fewer than asked do."""
    rate, mixed = safe_rate(case)
    assert rate > 0
    assert attained(case, rate, 800, mixed) >= 0.9
    assert attained(case, 2 * rate, 800, mixed) < 0.95


def test_targets_that_a_lone_request_breaks_have_no_safe_rate() -> None:
    for ttft, tpot, binding in ((10, 100, "TTFT"), (1000, 3, "TPOT")):
        found = safe(Group(MODEL, 1, Lengths(2000), Lengths(200), 1.0, False, None, RESIDENT), Goal(ttft, tpot, 0.95))
        assert (found.rate, found.binding) == (0.0, binding)


def told(name: str, found: list[tuple[float, float]]) -> str:
    """Of (safe, simulated) rates: their quotient's quantiles."""
    ratios = np.array([rate / true for rate, true in found])
    quantiles = ", ".join(f"p{q} {np.quantile(ratios, q / 100):.2f}" for q in (5, 25, 50, 75, 95))
    bound = sum(true > 0.95 * FURTHEST * max(rate, LEAST) for rate, true in found)
    return f"{name}, {len(ratios)} cases: {quantiles}, highest {max(ratios):.2f}; the search ended at its bound in {bound}"


if __name__ == "__main__":
    sorts = {
        "TTFT and TPOT, Poisson": lambda c: c.ttft_ms is not None and c.cv == 1,
        "TTFT and TPOT, bursts (cv 2)": lambda c: c.ttft_ms is not None and c.cv == 2,
        "TPOT alone": lambda c: c.ttft_ms is None,
        "all": lambda c: True,
    }
    by_case: dict[Case, tuple[float, float]] = {}
    for case in grid((1, 2, 4, 8), ((300, 20), (1000, 30), (None, 15), (2000, 80))):
        rate, mixed = safe_rate(case)
        true = simulated_rate(case, max(rate, LEAST), mixed, 1500)
        print(case, f"{rate:.2f} simulated {true:.2f}", flush=True)
        by_case[case] = rate, true
    for name, of in sorts.items():
        print("safe / simulated rate:", told(name, [r for case, r in by_case.items() if of(case) and r[0] > 0]))
    none = [true for rate, true in by_case.values() if rate == 0]
    print(f"no safe rate: {len(none)} cases, simulated at most {max(none, default=0.0):.2f} requests/s")
