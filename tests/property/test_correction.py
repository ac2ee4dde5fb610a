"""A wrong profile is learned away, outliers do not move it, no data changes nothing."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.layout import FlipMode
from nitsum.perf.correction import Bounds, Corrected, Phase, StepTiming
from nitsum.perf.profile import load_shipped

BASE = load_shipped("llama-3.1-8b-instruct.h100_sxm")
POINTS = [(b, c) for b in (1, 4, 16, 64) for c in (300, 1500, 6000)]


def decodes(factor: float, offset_ms: float, count: int, seed: int, tp: int = 1, noise: float = 0.05) -> list[StepTiming]:
    r = random.Random(seed)
    points = [r.choice(POINTS) for _ in range(count)]
    return [StepTiming(tp, 0, b, c, (BASE.decode_ms(tp, b, c) * factor + offset_ms) * r.gauss(1, noise)) for b, c in points]


def worst(model: Corrected, factor: float, offset_ms: float, tp: int = 1) -> float:
    return max(abs(model.decode_ms(tp, b, c) / (BASE.decode_ms(tp, b, c) * factor + offset_ms) - 1) for b, c in POINTS)


@given(st.sampled_from(BASE.tp_sizes), st.integers(1, 600), st.integers(0, 200_000), st.integers(1, 40_000), st.integers(0, 100_000))
def test_no_data_is_the_profile_itself(tp: int, batch: int, ctx: int, chunk: int, cached: int) -> None:
    model = Corrected(BASE)
    assert model.decode_ms(tp, batch, ctx) == BASE.decode_ms(tp, batch, ctx)
    assert model.prefill_ms(tp, chunk, cached) == BASE.prefill_ms(tp, chunk, cached)
    assert model.mixed_ms(tp, chunk, batch, ctx) == BASE.mixed_ms(tp, chunk, batch, ctx)
    assert model.mixed_ms(tp, chunk, batch, ctx, cached) == BASE.mixed_ms(tp, chunk, batch, ctx, cached)
    assert model.prefill_ms(tp, chunk, 0, 3) == BASE.prefill_ms(tp, chunk, 0, 3)
    assert model.kv_capacity_tokens(tp, (tp,)) == BASE.kv_capacity_tokens(tp, (tp,))
    assert model.confidence(tp, Phase.DECODE) == 0 == model.learned(tp, Phase.DECODE).accepted


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1 / 1.5, 1.5]), st.sampled_from([0.0, 1.0, 3.0]), st.integers(0, 1000))
def test_a_profile_that_is_wrong_either_way_is_learned_away(factor: float, offset_ms: float, seed: int) -> None:
    model = Corrected(BASE)
    assert worst(model, factor, offset_ms) > 0.25
    for t in decodes(factor, offset_ms, 150, seed):
        model.observe(t)
    assert worst(model, factor, offset_ms) < 0.07
    assert model.confidence(1, Phase.DECODE) > 0.6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(5, 100), st.sampled_from([0.02, 0.1]))
def test_outliers_do_not_move_it(seed: int, size: float, share: float) -> None:
    """The first measurement of all may be one."""
    clean, dirty = Corrected(BASE), Corrected(BASE)
    r = random.Random(seed)
    for i, t in enumerate(decodes(1.2, 0.0, 150, seed)):
        if i == 0 or r.random() < share:
            bad = StepTiming(1, 0, t.batch, t.ctx, t.ms * max(size, 8))
            assert not dirty.observe(bad)
        clean.observe(t)
        dirty.observe(t)
    assert worst(dirty, 1.2, 0.0) < 0.06
    assert all(dirty.decode_ms(1, b, c) == pytest.approx(clean.decode_ms(1, b, c), rel=0.03) for b, c in POINTS)


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.6), (1.5, 0.7), (1.0, 3.5)])
def test_a_lasting_change_is_learned_anew(before: float, after: float) -> None:
    model = Corrected(BASE)
    for t in decodes(before, 0, 200, 1):
        model.observe(t)
    for t in decodes(after, 0, 60, 2):
        model.observe(t)
    assert worst(model, after, 0) < 0.08


def test_it_stays_within_its_bounds() -> None:
    model = Corrected(BASE)
    for t in decodes(40.0, 0, 400, 1):
        model.observe(t)
    assert BASE.decode_ms(1, 1, 300) < model.decode_ms(1, 1, 300) <= (4 + Bounds().offset_share_max) * BASE.decode_ms(1, 1, 300)
    for t in decodes(0.01, 0, 400, 1):
        model.observe(t)
    assert model.decode_ms(1, 64, 6000) >= 0.25 * BASE.decode_ms(1, 64, 6000)
    learned = model.learned(1, Phase.DECODE)
    assert 0.25 <= learned.factor <= 4
    assert learned.error is not None
    assert learned.confidence < 0.5


def test_phases_are_apart_and_an_unmeasured_tp_borrows_from_the_measured() -> None:
    model = Corrected(BASE)
    for t in decodes(1.5, 0, 100, 1, tp=1):
        model.observe(t)
    assert model.prefill_ms(1, 2000) == BASE.prefill_ms(1, 2000)
    assert 1.25 < model.decode_ms(8, 16, 1500) / BASE.decode_ms(8, 16, 1500) < 1.5
    assert model.confidence(8, Phase.DECODE) == 0
    for t in decodes(1.0, 0, 100, 1, tp=8):
        model.observe(t)
    assert worst(model, 1.0, 0, tp=8) < 0.05
    assert worst(model, 1.5, 0, tp=1) < 0.05


def test_a_mixed_step_is_corrected_by_its_parts_until_it_is_measured() -> None:
    model = Corrected(BASE)
    for t in decodes(1.5, 0, 100, 1):
        model.observe(t)
        model.observe(StepTiming(1, 2048, 0, 0, BASE.prefill_ms(1, 2048) * 1.5))
    assert model.mixed_ms(1, 1024, 16, 1500) == pytest.approx(1.5 * BASE.mixed_ms(1, 1024, 16, 1500), rel=0.05)
    for _ in range(100):
        model.observe(StepTiming(1, 1024, 16, 1500, BASE.mixed_ms(1, 1024, 16, 1500) * 1.1))
    assert model.mixed_ms(1, 1024, 16, 1500) == pytest.approx(1.1 * BASE.mixed_ms(1, 1024, 16, 1500), rel=0.03)


def test_what_cannot_be_compared_is_not_taken() -> None:
    model = Corrected(BASE)
    for t in (StepTiming(3, 0, 1, 1, 5.0), StepTiming(1, 0, 0, 0, 5.0), StepTiming(1, 0, 1, 1, 0.0), StepTiming(1, 0, 1, 1, float("nan"))):
        assert not model.observe(t)
    assert model.decode_ms(1, 1, 1) == BASE.decode_ms(1, 1, 1)


def test_what_a_flip_computes_again_takes_what_prefill_takes() -> None:
    model = Corrected(BASE)
    for mode in FlipMode:
        assert model.pause_ms(50_000, mode, 1, 2) == BASE.pause_ms(50_000, mode, 1, 2), "nothing learned yet"
    for chunk in (256, 1024, 4096) * 60:
        model.observe(StepTiming(2, chunk, 0, 0, BASE.prefill_ms(2, chunk) * 1.5))
    fixed, aborted = (BASE.pause_ms(50_000, mode, 1, 2) for mode in (FlipMode.LET_FINISH, FlipMode.ABORT))
    assert model.pause_ms(50_000, FlipMode.LET_FINISH, 1, 2) == fixed
    assert model.pause_ms(50_000, FlipMode.ABORT, 1, 2) == pytest.approx(fixed + 1.5 * (aborted - fixed), rel=0.05)
    assert model.load_ms(1000, 2) == BASE.load_ms(1000, 2)
