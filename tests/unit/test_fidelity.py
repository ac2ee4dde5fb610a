"""The parts of `bench/fidelity.py` that need no engine."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nitsum.perf.profile import load_shipped

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
fidelity: Any = pytest.importorskip("fidelity")
PROFILE = load_shipped("tiny-llama.slot")
FACTS = fidelity.measure.Facts("tiny-llama", "cpu", "0", 1, 8192, 4000, 4096, 4096, False)


def test_the_error_is_relative_to_what_was_measured() -> None:
    pairs = [
        fidelity.Pair(0, 10, 5, 100.0, 110.0, 10.0, 8.0),
        fidelity.Pair(0, 10, 5, 100.0, 70.0, 10.0, 10.5),
        fidelity.Pair(0, 10, 1, 50.0, 50.0, None, None),
    ]
    found = fidelity.errors(pairs)
    assert found["requests"] == 3
    assert (found["ttft"]["median"], found["ttft"]["median_signed"]) == (0.1, 0.0)
    assert (found["tpot"]["median"], found["tpot"]["median_signed"]) == (0.125, -0.075)


def test_two_profiles_give_their_mean() -> None:
    table = PROFILE.tables[1]
    slower = replace(
        table, decode_ms=tuple(tuple(3 * x for x in r) for r in table.decode_ms), prefill_ms=tuple(3 * x for x in table.prefill_ms)
    )
    p = replace(PROFILE, tables={1: table})
    mean = fidelity.between(p, replace(p, tables={1: slower}))
    assert mean.decode_ms(1, 1, 64) == pytest.approx(2 * p.decode_ms(1, 1, 64))
    assert mean.prefill_ms(1, 64) == pytest.approx(2 * p.prefill_ms(1, 64))
    assert fidelity.between(p, replace(p, tables={1: replace(table, kv_tokens=1, batch=tuple(2 * b for b in table.batch))})) is p


def test_a_lone_request_is_foretold_by_its_steps() -> None:
    """The replay adds nothing of its own: first token after one prefill, then one decode step per token."""
    requests = fidelity.arrivals.Traffic(10.0, (fidelity.arrivals.Request(0, "t", 0.0, 64, 3, 3),), {}, ())
    (o,) = fidelity.predict(replace(PROFILE, tables={1: replace(PROFILE.tables[1], door_ms=3.0)}), requests, FACTS)
    assert o.ttft_ms == pytest.approx(PROFILE.prefill_ms(1, 64) + 3), "what it waits outside the engine on top"
    assert o.tpot_ms == pytest.approx((PROFILE.decode_ms(1, 1, 65) + PROFILE.decode_ms(1, 1, 66)) / 2, rel=0.02)


def test_the_same_seed_gives_the_same_trace() -> None:
    one, two, other = (fidelity.traffic("tiny", 30, seed, 4000).requests for seed in (1, 1, 2))
    assert one == two != other


def test_slices_hold_every_request_once() -> None:
    whole = fidelity.traffic("tiny", 40, 3, 4000)
    parts = fidelity.slices(whole, 4)
    assert [p.duration_s for p in parts] == [10.0] * 4
    back = [(round(k * 10 + r.arrived, 6), r.prompt, r.output) for k, p in enumerate(parts) for r in p.requests]
    assert back == [(round(r.arrived, 6), r.prompt, r.output) for r in whole.requests]
    assert all([r.rid for r in p.requests] == list(range(len(p.requests))) for p in parts)
