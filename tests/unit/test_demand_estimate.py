import pytest

from nitsum.demand_estimate import GAMMA, DemandEstimator, Sketch, Window


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
    assert d.prompt_tokens_p90 == pytest.approx(GAMMA**100)
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
    assert s.quantile(0.5) == pytest.approx(1.1**10, rel=0.03)
