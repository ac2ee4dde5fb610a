"""Interpolation, flip cost and memory: what physics says, whatever the numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.layout import FlipMode
from nitsum.perf.flip import FlipRates, KvPath
from nitsum.perf.grid import Grid
from nitsum.perf.profile import dump, load_shipped, parse, shipped
from nitsum_cli.smooth import monotone

PROFILES = [load_shipped(n) for n in shipped() if not n.endswith(".slot")]
profiles = st.sampled_from(PROFILES)
batches, contexts, chunks = st.integers(1, 2000), st.integers(0, 300_000), st.integers(1, 60_000)


@given(profiles, st.data(), batches, batches, contexts, contexts)
def test_more_work_never_takes_less_time(p, data, b1, b2, c1, c2) -> None:
    tp = data.draw(st.sampled_from(p.tp_sizes))
    (b1, b2), (c1, c2) = sorted((b1, b2)), sorted((c1, c2))
    assert p.decode_ms(tp, b1, c1) <= p.decode_ms(tp, b2, c2) * (1 + 1e-9)
    assert p.prefill_ms(tp, b1, c1) <= p.prefill_ms(tp, b2, c2) * (1 + 1e-9)
    assert p.prefill_ms(tp, b2, c1, 4) <= p.prefill_ms(tp, b2, c1)
    assert p.mixed_ms(tp, 512, b1, c1) >= max(p.decode_ms(tp, b1, c1), p.prefill_ms(tp, 512))


@given(profiles, st.data(), st.lists(st.tuples(batches, contexts), min_size=1, max_size=20))
def test_arrays_get_the_same_answers(p, data, points) -> None:
    tp = data.draw(st.sampled_from(p.tp_sizes))
    x, y = np.array(points).T
    assert p.decode_ms_many(tp, x, y) == pytest.approx([p.decode_ms(tp, b, c) for b, c in points], rel=1e-12)
    assert p.prefill_ms_many(tp, x, y) == pytest.approx([p.prefill_ms(tp, b, c) for b, c in points], rel=1e-12)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1), st.floats(-50, 50), st.floats(-50, 50))
def test_a_bilinear_function_is_met_exactly_inside_and_beyond(a, b, d, x, y) -> None:
    xs, ys = (1.0, 2.0, 7.0), (0.0, 3.0)
    f = lambda u, v: 1 + a * u + b * v + d * u * v  # noqa: E731
    grid = Grid(xs, ys, tuple(tuple(f(u, v) for v in ys) for u in xs))
    assert grid.at(x, y) == pytest.approx(f(max(x, 1.0), max(y, 0.0)))
    assert grid.many(np.array([x]), np.array([y]))[0] == pytest.approx(grid.at(x, y))


def test_a_table_of_one_point_is_the_same_everywhere() -> None:
    assert Grid((4.0,), (2.0,), ((7.0,),)).at(1, 1) == 7 == Grid((4.0,), (2.0,), ((7.0,),)).at(100, 100)


@given(st.lists(st.lists(st.floats(0.1, 100), min_size=4, max_size=4), min_size=2, max_size=6))
def test_smoothing_grows_along_both_axes_and_leaves_alone_what_grows_already(rows) -> None:
    grown, change = monotone(rows)
    a = np.array(grown)
    assert (np.diff(a, axis=0) > 0).all()
    assert (np.diff(a, axis=1) > 0).all()
    again, little = monotone(a.tolist())
    assert np.array(again) == pytest.approx(a, rel=1e-9)
    assert little < 1e-9 or change > 0


@given(profiles, st.data(), st.integers(0, 2_000_000), st.integers(0, 500_000), st.sampled_from(list(FlipMode)))
def test_a_flip_costs_no_less_with_more_kv_and_migration_never_more_than_abort(p, data, tokens, more, mode) -> None:
    a, b = data.draw(st.sampled_from(p.tp_sizes)), data.draw(st.sampled_from(p.tp_sizes))
    cost = lambda n, m: p.pause_ms(n, m, a, b)  # noqa: E731
    assert p.flip.fixed_ms <= cost(tokens, mode) <= cost(tokens + more, mode) + 1e-6
    assert cost(tokens, FlipMode.LET_FINISH) <= cost(tokens, FlipMode.MIGRATE_FIRST) <= cost(tokens, FlipMode.ABORT)


def test_peers_exchange_only_the_heads_that_move() -> None:
    rates = FlipRates(path=KvPath.PEER, nvlink_bytes_per_s=100e9)
    assert rates.copy_ms(10e9, 1, 2) == pytest.approx(50)
    assert rates.copy_ms(10e9, 8, 1) == pytest.approx(87.5)
    assert FlipRates(pcie_bytes_per_s=50e9, host_bytes_per_s=200e9).copy_ms(10e9, 8, 1) == pytest.approx(400)  # the host's memory binds


@given(profiles, st.data())
def test_kv_shrinks_with_every_further_resident_engine(p, data) -> None:
    tp = data.draw(st.sampled_from(p.tp_sizes))
    some = data.draw(st.sets(st.sampled_from(p.tp_sizes)))
    before = p.kv_capacity_tokens(tp, tuple(some))
    for other in p.tp_sizes:
        assert 0 <= p.kv_capacity_tokens(tp, (*some, other)) <= before


@pytest.mark.parametrize("p", PROFILES, ids=lambda p: p.name)
def test_written_and_read_again_it_is_the_same(p) -> None:
    assert parse(dump(p), p.name) == p
    assert len(dump(p)) < 60_000
