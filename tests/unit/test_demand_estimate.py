import math
import random
from collections import Counter

import pytest

from nitsum.demand_estimate import DemandEstimator, Window
from nitsum.length_sketch import BUCKET_MAX, GAMMA, Sketch, bucket, whole


def feed(e: DemandEstimator, rate: int, seconds: int, start: int = 0, gateway: str = "g") -> None:
    for s in range(start, start + seconds):
        e.observe(Window("p", "t", s + 1.0, 1.0, rate, rate**2, 3, ({100: rate}, 0, rate * GAMMA**100), gateway=gateway))


def test_a_steady_rate_is_found_with_its_uncertainty() -> None:
    e = DemandEstimator(10)
    feed(e, 4, 60)
    d = e.estimate(60.0)[0]
    assert d.rate == pytest.approx(4)
    assert 0.3 < d.rate_stddev < 0.8
    assert d.prompt_tokens_mean == pytest.approx(GAMMA**100)
    assert d.prompt_tokens_cv < 0.2, "all are equal; what is assumed of the unseen wears off"
    assert d.in_flight == 3


def test_two_gateways_add_up() -> None:
    e = DemandEstimator(10)
    for s in range(60):
        feed(e, 2, 1, s, "g")
        feed(e, 3, 1, s, "h")
    assert e.estimate(60.0)[0].rate == pytest.approx(5, rel=0.05)


def test_a_change_is_followed_within_two_half_lives() -> None:
    e = DemandEstimator(10)
    feed(e, 10, 60)
    feed(e, 0, 20, 60)
    assert e.estimate(80.0)[0].rate < 3


def test_a_frozen_tier_stays_as_it_was() -> None:
    e = DemandEstimator(10)
    feed(e, 4, 60)
    e.observe(Window("p", "u", 60.0, 1.0, 3))
    e.freeze("p", 60.0, ["t"])
    feed(e, 100, 5, 60)
    assert e.estimate(65.0)[0].rate == pytest.approx(4)
    assert e.estimate(65.0)[0].frozen
    assert [d.frozen for d in e.estimate(65.0)] == [True, False], "only the tier that flips"
    e.freeze("p", 65.0, ())
    assert e.estimate(65.0)[0].rate > 10


def test_a_foreign_gamma_is_converted() -> None:
    s = Sketch()
    s.merge({10: 5}, 0, 5 * 1.1**10, gamma=1.1)
    assert s.mean == pytest.approx(1.1**10)
    assert max(s.buckets) == pytest.approx(10 * math.log(1.1) / math.log(GAMMA), abs=1)


def test_the_spread_of_lengths_is_found() -> None:
    drawn = random.Random(1)
    values = [drawn.lognormvariate(7, 0.8) for _ in range(5000)]
    s = Sketch()
    s.merge(dict(Counter(math.ceil(math.log(v) / math.log(GAMMA)) for v in values)), 0, sum(values))
    assert s.cv == pytest.approx(math.sqrt(math.exp(0.8**2) - 1), rel=0.05)
    few = Sketch()
    few.merge({300: 2}, 0, 2 * GAMMA**300)
    assert 0.8 < few.cv < 1, "two equal lengths do not say that all are"


def test_long_streams_count_before_they_end() -> None:
    """1 request/s, 10 tokens/s, lengths exponential with mean 300: after 20 s only short ones have ended."""
    drawn, e, streams = random.Random(3), DemandEstimator(10), list[tuple[float, int]]()
    seen: dict[float, float] = {}
    for s in range(1, 401):
        streams += [(s - 1 + drawn.random(), math.ceil(drawn.expovariate(1 / 300))) for _ in range(10)]
        ended = [n for at, n in streams if at + n / 10 <= s]
        streams = [(at, n) for at, n in streams if at + n / 10 > s]
        running = Counter(bucket(made) for at, _ in streams if (made := int((s - at) * 10)))
        e.observe(Window("p", "t", float(s), 1.0, 10, 100.0, 0, output=(dict(Counter(map(bucket, ended))), 0, sum(ended)), running=running))
        if s in (20, 400):
            seen[s] = e.estimate(s)[0].output_tokens_mean
    assert seen[20] == pytest.approx(300, rel=0.25), "those that have ended have 85 tokens"
    assert seen[400] == pytest.approx(300, rel=0.1), "and once it has seen whole lives nothing is counted twice"


def test_a_new_leader_does_not_take_lives_that_it_meets_halfway_for_new_streams() -> None:
    """10 requests/s, lengths exponential with mean 300, in a steady state when the estimator begins to look."""
    drawn, e, streams = random.Random(3), DemandEstimator(10), list[tuple[float, int]]()
    for s in range(1, 421):
        streams += [(s - 1 + drawn.random(), math.ceil(drawn.expovariate(1 / 300))) for _ in range(10)]
        ended = [n for at, n in streams if at + n / 10 <= s]
        streams = [(at, n) for at, n in streams if at + n / 10 > s]
        running = Counter(bucket(made) for at, _ in streams if (made := int((s - at) * 10)))
        if s > 400:
            output = dict(Counter(map(bucket, ended))), 0, float(sum(ended))
            e.observe(Window("p", "t", float(s), 1.0, 10, 100.0, 0, output=output, running=running))
        if s in (410, 420):
            assert e.estimate(s)[0].output_tokens_mean == pytest.approx(300, rel=0.35), "five times as many where all count as unseen"


def test_a_gateway_that_is_heard_again_after_long_is_as_new() -> None:
    """What ran when it was last heard is not what is usual now: its streams of today are met halfway."""
    e = DemandEstimator(10)
    for at in (1.0, 2.0, 3600.0, 3601.0):
        running = {bucket(500): 40 if at > 3000 else 1}
        e.observe(Window("p", "t", at, 1.0, 2, 4.0, output=({bucket(1000): 2}, 0, 2000.0), running=running, gateway="g"))
    (tier,) = e._tiers.values()
    assert tier.usual["g"] == pytest.approx(38, abs=1)


def test_a_quiet_tier_knows_its_lengths_when_a_stream_comes_after_hours() -> None:
    e = DemandEstimator(10)
    ended = {bucket(n): 1 for n in range(200, 400, 10)}
    e.observe(Window("p", "t", 1.0, 1.0, 20, 400.0, output=(ended, 0, float(sum(range(200, 400, 10))))))
    before = e.estimate(1.0)[0].output_tokens_mean
    for s in range(20, 20_000, 20):
        e.observe(Window("p", "t", float(s), 20.0, 0))
    e.observe(Window("p", "t", 20_000.0, 20.0, 1, 1.0, running={bucket(5): 1}))
    assert e.estimate(20_000.0)[0].output_tokens_mean == pytest.approx(before, rel=0.02), "its first tokens say nothing of it"


def test_a_gateway_that_has_gone_counts_no_more() -> None:
    e = DemandEstimator(10)
    for s in range(400):
        feed(e, 2, 1, s, f"g{s // 20}")
    assert e.estimate(400.0)[0].in_flight <= 3 * 8, "20 gateways in a row, each with 3 in flight when it was last heard"
    (tier,) = e._tiers.values()
    assert max(map(len, (tier.in_flight, tier.running, tier.usual, tier.seconds))) <= 8


def test_buckets_that_no_length_has_count_in_the_last_one() -> None:
    for gamma in (GAMMA, 1.1, 0.0, -1.0, math.nan, math.inf):
        s = Sketch()
        s.merge({2**31 - 1: 2, -(2**31): 1}, 0, 3.0, gamma)
        assert max(s.buckets) == BUCKET_MAX
        assert s.count == sum(s.buckets.values()) == 3
        assert all(map(math.isfinite, (s.cv, s.quantile(0.9), *whole(s, {10: 1.0}))))


def test_streams_of_equal_length_are_not_overestimated() -> None:
    ended, running = Sketch(), {bucket(n): 1.0 for n in range(10, 200, 10)}
    ended.merge({bucket(200): 5}, 0, 1000)
    mean, cv = whole(ended, running)
    assert mean == pytest.approx(200, rel=0.02)
    assert whole(ended, {})[0] == 200
    assert cv < whole(Sketch(), running)[1]


def test_values_go_where_they_are_read_again() -> None:
    s = Sketch()
    for value in (0.0, 100.0, 100.0):
        s.add(value)
    s.add(1000, 3)
    assert (s.count, s.zeros, s.total) == (6, 1, 3200)
    assert s.quantile(0.5) == pytest.approx(100, rel=0.02)
    assert s.quantile(0.9) == pytest.approx(1000, rel=0.02)
    assert all(GAMMA ** (k - 1) < v <= GAMMA**k for v, k in ((100, min(s.buckets)), (1000, max(s.buckets))))
