"""Places where what prefills will be decoded: promised, kept on the way, given up."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nitsum.layout import Capacity
from nitsum.ledger import Admission, Admitted, Entry, Ledger, Queued
from nitsum.onward import WAY_S, Onward


def entry(rid: str, kv: int = 10, at: float = 0) -> Entry:
    return Entry(rid, "t", Admission.FEASIBLE, kv, at, at + 60)


def linked(*decode: Capacity, prefill: int = 1) -> tuple[Onward, list[Ledger], list[Ledger]]:
    onward, p, d = Onward(), [Ledger(Capacity()) for _ in range(prefill)], [Ledger(c) for c in decode]
    assert onward.link(tuple(p), tuple(d)) == tuple(p)
    return onward, p, d


def test_what_would_find_no_place_waits_before_its_prefill() -> None:
    onward, (p,), (d,) = linked(Capacity(max_running=1))
    assert p.submit(entry("a"), 0) == Admitted()
    assert p.submit(entry("b"), 0) == Queued()
    assert onward.depart("a", (1, "a"), 0) is d
    assert p.finish("a", 0) == [], "its place is kept on its way"
    assert onward.arrived((1, "a"))
    assert d.submit(replace(entry("a"), moved=True), 0) == Admitted()
    assert p.start() == []
    d.finish("a", 1)
    assert [e.rid for e in p.start()] == ["b"]


def test_one_too_long_for_any_waits_until_all_is_still_there_and_then_the_rest_goes_on() -> None:
    _, (p,), (d,) = linked(Capacity(max_kv_tokens=100))
    p.submit(entry("a"), 0)
    assert [p.submit(entry("giant", kv=500, at=1), 1), p.submit(entry("b", kv=95, at=2), 2)] == [Queued(), Queued()]
    assert [e.rid for e in p.finish("a", 3)] == ["giant"]
    assert (d.reserved, d.reserved_kv_tokens) == (1, 500)
    assert [e.rid for e in p.finish("giant", 4)] == ["b"]


def test_what_stays_has_no_place_and_waits_for_none() -> None:
    onward, (p,), (d,) = linked(Capacity(max_running=1))
    p.submit(entry("a"), 0)
    assert p.submit(replace(entry("back"), stays=True), 0) == Admitted()
    assert (onward.place("a"), onward.place("back"), d.reserved) == (d, None, 1)
    onward.link((p,), ())
    onward.link((p,), (d,))
    assert (onward.place("back"), d.reserved) == (None, 1)


def test_places_go_to_those_that_wait_longest_in_whichever_group() -> None:
    onward, prefill, (d,) = linked(Capacity(max_running=1), prefill=2)
    d.submit(entry("d"), 0)
    late, early = prefill
    late.submit(entry("later", at=3), 3)
    early.submit(entry("first", at=1), 3)
    early.submit(entry("second", at=2), 3)
    early.submit(replace(entry("last", at=0), admission=Admission.BACKGROUND), 3)
    late.submit(entry("latest", at=4), 4)
    order = ["d"]
    for _ in range(5):
        for ledger in (d, early, late):
            ledger.release(order[-1], 4)
        order += [e.rid for e in onward.start()]
    assert order == ["d", "first", "second", "later", "latest", "last"]


def test_nothing_is_kept_for_ever_on_its_way() -> None:
    onward, (p,), (d,) = linked(Capacity())
    p.submit(entry("a"), 0)
    onward.depart("a", (1, "a"), 5)
    p.finish("a", 5)
    onward.expire(5 + WAY_S - 0.01)
    assert d.reserved == 1
    onward.expire(5 + WAY_S)
    assert (d.reserved, onward.on_way, onward.arrived((1, "a"))) == (0, (), False)


def test_a_ledger_that_no_longer_takes_in_keeps_nothing_and_others_promise() -> None:
    onward, (p,), (first, second) = linked(Capacity(max_running=2), Capacity(max_running=2))
    for rid in "abc":
        p.submit(entry(rid), 0)
    assert (first.reserved, second.reserved) == (2, 1)
    onward.depart("a", (1, "a"), 0)
    p.release("a", 0)
    onward.depart("b", (1, "b"), 0)
    p.release("b", 0)
    assert onward.link((p,), (second,)) == (p,)
    assert (first.reserved, second.reserved, onward.on_way) == (0, 2, ((1, "b"),)), "of b on its way, and c"
    assert onward.link((p,), ()) == (p,)
    assert (second.reserved, second.reserved_kv_tokens, p.onward) == (0, 0, None)
    assert onward.link((p,), ()) == ()


def test_a_ledger_that_no_longer_hands_over_gives_its_places_up() -> None:
    onward, (p, other), (d,) = linked(Capacity(max_running=2), prefill=2)
    p.submit(entry("a"), 0)
    other.submit(entry("b"), 0)
    assert p.submit(entry("c"), 0) == Queued()
    assert onward.link((other,), (d,)) == (p,)
    assert (d.reserved, p.onward) == (1, None)
    assert [e.rid for e in p.start()] == ["c"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["new", "over", "here", "lost", "done", "gone", "clear", "own", "link"]), st.integers(0, 1), st.integers(1, 60)
        ),
        max_size=80,
    )
)
def test_what_prefills_finds_a_place_where_it_decodes(acts: list[tuple[str, int, int]]) -> None:
    """Two prefill ledgers, two of decode: what was let in never waits there, and its KV fits."""
    decode = [Ledger(Capacity(max_running=3, max_kv_tokens=100)) for _ in range(2)]
    prefill = [Ledger(Capacity(max_running=3)) for _ in range(2)]
    onward, away = Onward(), dict[str, tuple[Ledger, Entry]]()
    onward.link(tuple(prefill), tuple(decode))
    for i, (act, which, kv) in enumerate(acts):
        p, d = prefill[which], decode[which]
        if act == "new":
            p.submit(entry(str(i), kv=kv, at=i), i)
        elif act == "over" and p.running:
            handed = next(iter(p.running.values()))
            taker = onward.depart(handed.rid, (1, handed.rid), 0)
            assert taker is not None
            away[handed.rid] = taker, handed
            p.finish(handed.rid, i)
        elif act in ("here", "lost") and away:
            rid, (taker, handed) = away.popitem()
            assert onward.arrived((1, rid))
            if act == "here":
                assert taker.submit(replace(handed, moved=True), i) == Admitted()
        elif act == "gone" and p.running:
            p.finish(next(iter(p.running)), i)
        elif act == "clear":
            p.clear()
        elif act == "done" and d.running:
            d.finish(next(iter(d.running)), i)
        elif act == "own":
            d.submit(entry(str(i), kv=kv, at=i), i)  # takes no promised place
        elif act == "link" and not p.running:  # what runs might find its new place narrower
            onward.link((prefill[1 - which],), tuple(decode))
            onward.link(tuple(prefill), tuple(decode))
        for waiting in (*prefill, *decode):
            waiting.start()
        on_way = [e.kv_tokens for _, e in away.values()]
        assert sum(d.reserved for d in decode) == sum(len(p.running) for p in prefill) + len(on_way)
        assert sum(d.reserved_kv_tokens for d in decode) == sum(p.kv_tokens for p in prefill) + sum(on_way)
        for d in decode:
            assert len(d.running) + d.reserved <= 3
            assert len(d.running) + d.reserved <= 1 or d.kv_tokens + d.reserved_kv_tokens <= 100
    onward.link(tuple(prefill), ())
    assert not any(d.reserved or d.reserved_kv_tokens for d in decode)
