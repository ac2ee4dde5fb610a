"""What makes safe rates cheap must not move them: Newton's steps against bisection, and what goals share against working it out anew."""

import itertools
import math

import pytest

from nitsum.attainment import Goal, Group, Lengths, Safe, safe, steady
from nitsum.perf.profile import load_shipped

MODELS = [load_shipped(name) for name in ("llama-3.1-8b-instruct.h100_sxm", "qwen3-32b.h100_sxm")]
RESIDENT = (1, 2, 4, 8)
SHAPES = (((1000, 0.8), (200, 0.8)), ((4000, 1.2), (400, 0.15)), ((200, 0), (30, 0.8)))
GOALS = (Goal(300, 12, 0.95), Goal(1000, 40, 0.9), Goal(None, 30, 0.95), Goal(800, None, 0.99), Goal(1000, 20, 0.95, 300))


def bisected(rate: float, decode: float, work: float, fixed: float) -> tuple[float, float]:
    """The share of prefill steps by bisection alone, far more finely than needed."""
    if not fixed:
        return rate, max(1 - rate * work, 0.0) / decode
    low, high = 0.0, rate
    for _ in range(40):
        steps = (low + high) / 2
        free = max(1 - rate * work - steps * fixed, 0.0) / decode
        lasting = fixed + work * rate / steps
        less = steps < free * (1 - math.exp(-rate * decode)) * math.exp(min(rate * lasting, 50.0))
        low, high = (steps, high) if less else (low, steps)
    return high, max(1 - rate * work - high * fixed, 0.0) / decode


def group(model: int, tp_size: int, shape: int, governed: bool, crowd: int, dispersion: float) -> Group:
    prompt, output = (Lengths(*pair) for pair in SHAPES[shape])
    return Group(MODELS[model], tp_size, prompt, output, dispersion, governed, Lengths(300, 0.8), RESIDENT, crowd)


@pytest.mark.parametrize(("model", "tp_size", "shape"), list(itertools.product((0, 1), (1, 4), (0, 1, 2))))
def test_safe_rates_are_those_of_bisection(monkeypatch: pytest.MonkeyPatch, model: int, tp_size: int, shape: int) -> None:
    for goal, crowd in itertools.product(GOALS, (1, 8)):
        quick = safe(group(model, tp_size, shape, False, crowd, 2.0), goal)
        with monkeypatch.context() as m:
            m.setattr(steady, "steps", bisected)
            sought = safe(group(model, tp_size, shape, False, crowd, 2.0), goal)
        assert quick.rate == pytest.approx(sought.rate, rel=0.01)
        assert quick.binding == sought.binding
        assert quick.batch == pytest.approx(sought.batch, rel=0.05, abs=1)


@pytest.mark.parametrize("governed", [False, True])
def test_what_goals_share_changes_none_of_them(governed: bool) -> None:
    """In whichever order they are asked: plans must not depend on what was asked before."""
    asked = list(itertools.product(GOALS, (1, 8), (1.0, 2.25)))

    def fresh(goal: Goal, crowd: int, dispersion: float) -> Safe:
        return safe(group(0, 2, 0, governed, crowd, dispersion), goal)

    for order in (asked, asked[::-1]):
        engine = group(0, 2, 0, governed, 1, 1.0)
        for goal, crowd, dispersion in order:
            assert safe(engine.among(crowd, dispersion, Lengths(300, 0.8)), goal) == fresh(goal, crowd, dispersion)


def test_a_tail_that_ends_nowhere_does_not_close_a_group() -> None:
    """Mean prompts of 20,000 whose 99.5th percentile by a lognormal is longer than KV, and than the model's context."""
    for cv in (0.5, 1.0, 2.0):
        found = safe(Group(MODELS[1], 4, Lengths(20_000, cv), Lengths(300, 1), governed=True, resident_tp=RESIDENT), Goal(20_000, 60, 0.9))
        assert found.rate > 0.1, cv
    assert safe(Group(MODELS[1], 4, Lengths(200_000), Lengths(300, 1), resident_tp=RESIDENT), Goal(None, 60, 0.9)).rate == 0
