"""What misses all the same comes off a plan's score, and labels that leave long streams behind cost."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.planner import relabel
from nitsum.planner.answer import Answer, value
from nitsum.planner.problem import REACH, REST, Class, Kind, Problem, Want
from nitsum.planner.rating import apart, good, met, rated, spilled
from nitsum.pool import Tier

SHARED = Kind("p", 1, ("fast", "slow"), (10.0, 2.0), attained=((1.0, 1.0), (0.98, 0.95)))
FAST = Kind("p", 1, ("fast",), (12.0,), attained=((1.0, 0.99),))
SLOW = Kind("p", 1, ("slow",), (4.0,), attained=((1.0, 1.0),))


def asked(fast: float, slow: float, *kinds: Kind, gpus: int = 2) -> Problem:
    wants = (Want("p", "fast", fast, 0.95, 1.0), Want("p", "slow", slow, 0.95, 1.0))
    return Problem(wants, kinds, (Class(1, gpus, frozenset({"p"}), {1: gpus}),), {"p": gpus})


def test_half_used_groups_miss_half_as_much_as_at_half_their_rate_and_full_ones_all() -> None:
    assert [met(SHARED, used, "slow") for used in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.99, 0.98, 0.965, 0.95])


def test_tiers_that_share_a_group_miss_by_who_takes_its_time() -> None:
    """`slow` takes 0.8 of it, `fast` 0.1, who alone would miss nothing; both miss what `slow` makes them."""
    p = asked(1.0, 1.6, SHARED, gpus=1)
    answer = value(p, {(0, 0): 1}, "test")
    missed = (0.1 * 0.0 + 0.8 * (1 - met(SHARED, 0.9, "slow"))) / 0.9
    each = (0.95 * REACH + 0.05 * REST) * 2.6
    assert answer.score - rated(p, answer).score == pytest.approx(missed * each)


@pytest.mark.parametrize("target", [0.5, 0.7, 0.95])
def test_more_groups_are_never_rated_lower_whatever_share_is_asked_for(target: float) -> None:
    kind = Kind("p", 1, ("fast",), (2.0,), attained=(((1 + target) / 2, target),))
    scores = []
    for n in range(1, 9):
        p = Problem((Want("p", "fast", 11.3, target, 1.0, sure=9.0),), (kind,), (Class(1, 8, frozenset({"p"}), {1: 8}),), {"p": 8})
        scores.append(rated(p, value(p, {(0, 0): n}, "test")).score)
    assert scores == sorted(scores)
    assert scores[0] > 0


def test_of_answers_that_serve_all_the_one_with_fewer_misses_is_rated_higher() -> None:
    p = asked(4.0, 2.0, SHARED, FAST, SLOW)
    together, alone = value(p, {(0, 0): 2}, "test"), value(p, {(0, 1): 1, (0, 2): 1}, "test")
    assert together.served == alone.served
    assert rated(p, alone).score - alone.score > rated(p, together).score - together.score
    assert not any(rate for k in apart(p).kinds for rate in k.rates if len(k.tiers) > 1)


def test_what_is_not_known_costs_nothing() -> None:
    p = asked(4.0, 2.0, replace(SHARED, attained=()))
    answer = value(p, {(0, 0): 2}, "test")
    assert rated(p, answer) == answer


def lost(now: int, then: int, output: float, served: float = 9.0) -> float:
    """One of two groups changes from the kind `now` to `then`."""
    p = asked(4.0, 2.0, FAST, SLOW)
    tiers = {"fast": Tier("fast", 500, 10), "slow": Tier("slow", 5000, 50)}
    demand = {t: TierDemand("p", t, 1.0, output_tokens_mean=output) for t in tiers}
    before = Answer({(0, now): 2}, 0.0, {("p", "fast"): served, ("p", "slow"): served}, {}, {}, "test")
    return relabel.lost(p, tiers, demand, before, value(p, {(0, now): 1, (0, then): 1}, "test"))


def test_a_strict_tier_pays_for_the_long_streams_that_a_loose_one_leaves_behind() -> None:
    assert 0 < lost(1, 0, 100.0) < lost(1, 0, 1000.0) <= REACH * 4.0
    assert lost(0, 1, 1000.0) == 0, "those of a strict tier end in time for a loose one"
    assert lost(1, 1, 1000.0) == 0
    assert lost(1, 0, 1000.0, served=0.0) == 0, "a tier that is short takes what it can get, whoever runs there"


@pytest.mark.parametrize(("target", "sure"), [(0.95, 9.0), (0.5, 9.0), (0.95, 0.0), (1.0, 20.0)])
def test_worth_falls_from_piece_to_piece_and_every_width_is_real(target: float, sure: float) -> None:
    want = Want("p", "fast", 11.3, target, 2.0, sure=sure)
    worths = [worth for _, worth in want.pieces()]
    assert worths == sorted(worths, reverse=True)
    assert all(width >= 0 for width, _ in want.pieces())
    assert want.earned(11.3) == pytest.approx(want.earned(1e9)), "what lies beyond the demand is not counted"


BOTH, ONE, OTHER = Kind("p", 1, ("fast", "slow"), (10.0, 5.0)), Kind("p", 1, ("fast",), (10.0,)), Kind("p", 1, ("slow",), (5.0,))


def test_what_spills_goes_to_the_least_used_groups_and_pushes_out_what_shares_them() -> None:
    """`fast` asks for 20/s, twice what its own group serves, `slow` for 4/s of the 5/s of the group that both may use. Routers fill both
    groups to the same level: asked for is the time of 20 / 10 + 4 / 5 = 2.8 groups of 2, so each serves 1 / 1.4 of what comes."""
    p = asked(20.0, 4.0, ONE, BOTH)
    answer = value(p, {(0, 0): 1, (0, 1): 1}, "test")
    found = spilled(p, answer)
    assert found.served == {("p", "fast"): pytest.approx(20 / 1.4), ("p", "slow"): pytest.approx(4 / 1.4)}
    assert good(p, answer, {("p", "slow"): 3.0}) == {("p", "slow"): pytest.approx(4 / 1.4)}


def test_nothing_spills_where_all_is_served_or_no_group_is_shared() -> None:
    enough = asked(8.0, 4.0, ONE, BOTH)
    answer = value(enough, {(0, 0): 1, (0, 1): 1}, "test")
    assert spilled(enough, answer) is answer
    alone = asked(20.0, 4.0, ONE, OTHER)
    answer = value(alone, {(0, 0): 1, (0, 1): 1}, "test")
    assert spilled(alone, answer).served == {("p", "fast"): pytest.approx(10.0), ("p", "slow"): pytest.approx(4.0)}
    assert spilled(alone, answer).score == pytest.approx(answer.score)


@given(
    rates=st.tuples(st.floats(0.5, 40), st.floats(0.5, 40)),
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).filter(any),
)
def test_spilled_groups_are_never_used_beyond_all_of_their_time(rates: tuple[float, float], counts: tuple[int, int, int]) -> None:
    p = asked(*rates, ONE, OTHER, BOTH, gpus=12)
    answer = value(p, {(0, k): n for k, n in enumerate(counts) if n}, "test")
    found = spilled(p, answer)
    fast, slow = found.served["p", "fast"], found.served["p", "slow"]
    assert fast / 10 + slow / 5 <= sum(counts) + 1e-6
    assert all(found.served[w.pool, w.tier] <= w.rate * (1 + 1e-9) for w in p.wants)


def test_expected_goodput_is_never_below_nothing() -> None:
    """What misses is a part of what is served, not of what the search let flow."""
    shared = Kind("p", 1, ("fast", "slow"), (10.0, 10.0), attained=((0.9, 0.5), (0.9, 0.5)))
    p = asked(1000.0, 9.0, shared, gpus=1)
    answer = value(p, {(0, 0): 1}, "test")
    found = good(p, answer, {("p", "fast"): 1000.0, ("p", "slow"): 9.0})
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(5.0)
