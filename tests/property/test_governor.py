"""The governor's decisions: a simulated scheduler that obeys them neither starves nor stalls, and a budget keeps its TPOT."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.governor import CHUNK_MIN, LUMP, MEAN, Room, batch_max, depth, prefill_budget, room, sizes, step_ms
from nitsum.perf.profile import Profile, load_shipped, parse, shipped

PROFILES = [load_shipped(name) for name in shipped()]
ALIGN = st.sampled_from([1, 16, 48])
BUDGET = st.integers(0, 5000)


@given(BUDGET, st.integers(0, 600), st.integers(48, 4096), ALIGN, st.booleans(), st.booleans())
def test_room_is_aligned_within_budget_and_buffers(
    budget: int, decodes: int, chunk_max: int, align: int, mixes: bool, waited: bool
) -> None:
    r = room(budget, decodes, chunk_max, align, mixes, waited)
    if not budget or not decodes:
        assert r == Room(chunk_max, False), "nothing waits, or nobody asked: as stock"
        return
    assert r.tokens <= max(budget, align)
    assert r.tokens + (decodes if r.mixed else 0) <= chunk_max
    assert not r.tokens % align or r.tokens == chunk_max
    assert (r.tokens == 0) == waited
    assert mixes or not r.mixed
    assert r.tokens <= room(budget + 1, decodes, chunk_max, align, mixes, waited).tokens, "more budget, no less room"


@given(
    st.integers(0, 20_000),
    BUDGET,
    st.integers(1, 300),
    st.integers(0, 60),
    st.integers(512, 4096),
    ALIGN,
    st.lists(st.booleans(), min_size=1),
)
def test_whoever_obeys_neither_starves_prefill_nor_stalls_decode(
    waiting: int, budget: int, decodes: int, ends: int, chunk_max: int, align: int, refusals: list[bool]
) -> None:
    """`waiting` prefill tokens, streams that end after some steps, and steps that the engine refuses to mix after all."""
    waited, since, steps = False, 0, 0
    while waiting:
        r = room(budget, decodes, chunk_max, align, True, waited)
        chunk = min(r.tokens, waiting)
        mixed = r.mixed and not refusals[steps % len(refusals)]
        waiting -= chunk
        since = since + chunk if decodes and not mixed and chunk else 0
        waited = bool(decodes and chunk and not mixed)
        if budget:
            assert since <= max(budget, align), "a stream waits for one chunk"
        steps += 1
        decodes = max(decodes - (steps > ends), 0)
        assert steps <= 2 * 20_000 + 1, "starved"


@st.composite
def questions(draw: st.DrawFn) -> tuple[Profile, int, int, int]:
    profile = draw(st.sampled_from(PROFILES))
    return profile, draw(st.sampled_from(profile.tp_sizes)), draw(st.integers(0, 256)), draw(st.integers(1, 8000))


@given(questions(), st.floats(0.1, 500), st.floats(1, 4), st.integers(0, 30_000), st.sampled_from([16, 64]))
def test_a_budget_keeps_the_target_and_grows_with_it(
    question: tuple[Profile, int, int, int], tpot_ms: float, factor: float, behind: int, page: int
) -> None:
    model, tp, batch, ctx = question
    tokens = prefill_budget(model, tp, batch, ctx, tpot_ms, behind, page)

    def step_ms(chunk: int) -> float:
        dearer = model.prefill_ms(tp, chunk, behind) - model.prefill_ms(tp, chunk) if behind else 0.0
        return model.mixed_ms(tp, chunk, batch, ctx) + dearer

    assert tokens % page == 0
    assert page <= tokens <= 8192
    assert tokens == page or step_ms(tokens) <= tpot_ms
    assert tokens == 8192 or step_ms(tokens + page) > tpot_ms, "and no more would"
    assert prefill_budget(model, tp, batch, ctx, tpot_ms * factor, behind, page) >= tokens
    assert prefill_budget(model, tp, batch + 8, ctx, tpot_ms, behind, page) <= tokens
    assert prefill_budget(model, tp, batch, ctx, tpot_ms, behind + 4000, page) <= tokens


def test_no_target_no_budget_and_the_issues_own_figure() -> None:
    """Llama-3.1-8B on an H100: 2k of prefill at TP 1 take 46 ms, so a TPOT of 20 ms allows a step of fewer tokens, TP 4 more of them."""
    tables = {
        tp: {
            "decode": {"batch": [1, 8, 32, 128], "context": [2048], "ms": [[ms] for ms in decode]},
            "prefill": {"tokens": [1, 2048], "ms": [decode[0], prefill]},
            "kv_tokens": 100_000,
        }
        for tp, decode, prefill in ((1, [6.6, 7.4, 9.5, 18.3], 46), (4, [2.6, 2.8, 3.5, 6.3], 20))
    }
    model = parse(json.dumps({"origin": "modelled", "tp": tables}), "p")
    assert prefill_budget(model, 1, 8, 2048, 0) == 0
    one, full, four = (prefill_budget(model, tp, batch, 2048, 20) for tp, batch in ((1, 8), (1, 128), (4, 8)))
    assert 16 < full < 128 < 512 < one < 1024 < four
    assert prefill_budget(model, 1, 200, 2048, 20) == 16, "decode alone is too slow: prefill still goes on"


@pytest.mark.parametrize(
    ("tp", "prompt", "output", "tpot_ms"), [(1, 1000, 200, 20), (2, 500, 200, 12), (4, 8000, 300, 40), (1, 100, 30, 40)]
)
def test_as_many_run_as_keep_up_with_their_own_prefill_within_tpot(tp: int, prompt: int, output: int, tpot_ms: float) -> None:
    model, ctx = load_shipped("llama-3.1-8b-instruct.h100_sxm"), prompt + output // 2
    b, chunk = sizes(model, tp, prompt, output, tpot_ms, 10**6)
    assert chunk > CHUNK_MIN

    def ms(batch: int) -> float:
        part = round(batch * prompt / output)
        return step_ms(model, tp, part, batch, ctx, depth(prompt, part))

    assert ms(b) <= tpot_ms
    assert step_ms(model, tp, chunk, b, ctx, depth(prompt, chunk)) <= tpot_ms * 1.01
    assert chunk >= b * prompt / output - 16, "prefill falls behind"
    assert ms(b + 1) > tpot_ms, "one more would fit"
    assert batch_max(model, tp, prompt, output, tpot_ms, prompt + output) == 1, "KV"


def test_where_no_prefill_fits_into_a_step_it_comes_in_few_longer_ones() -> None:
    """A 32B at TP2 decodes in 14 ms and takes 16.5 for any step with prefill: under a TPOT of 16 ms the mean holds, not each step."""
    model, prompt, output, tpot_ms = load_shipped("qwen3-32b.h100_sxm"), 120.0, 50.0, 16.0
    b, chunk = sizes(model, 2, prompt, output, tpot_ms, 10**6)
    long, alone = step_ms(model, 2, chunk, b, 145, depth(prompt, chunk)), model.decode_ms(2, b, 145)
    assert tpot_ms < long <= LUMP * tpot_ms
    assert alone + b * prompt / output / chunk * (long - alone) <= MEAN * tpot_ms
    assert b > 8
