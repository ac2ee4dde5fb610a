from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.layout import Capacity, TierShare
from nitsum.ledger import Admission, Admitted, Entry, Full, Ledger, Queued


def entry(
    rid: str,
    admission: Admission = Admission.FEASIBLE,
    kv: int = 10,
    at: float = 0,
    tier: str = "t",
    suspect: bool = False,
    moved: bool = False,
) -> Entry:
    return Entry(rid, tier, admission, kv, at, at + 5, suspect, moved)


def test_order_of_queues_then_arrival() -> None:
    ledger = Ledger(Capacity(max_running=1))
    assert ledger.submit(entry("a"), 0) == Admitted()
    assert ledger.submit(entry("b", Admission.BACKGROUND), 0) == Queued()
    assert ledger.submit(entry("c", at=2), 0) == Queued()
    assert ledger.submit(entry("d", at=1), 0) == Queued()
    assert [[e.rid for e in ledger.finish(r, 1)] for r in ("a", "d", "c", "b")] == [["d"], ["c"], ["b"], []]


def test_full_names_a_pause() -> None:
    ledger = Ledger(Capacity(max_running=1, max_queued=1))
    ledger.submit(entry("a"), 0)
    ledger.submit(entry("b"), 0)
    answer = ledger.submit(entry("c"), 0)
    assert isinstance(answer, Full)
    assert 100 <= answer.retry_after_ms <= 30_000


def test_kv_bound_and_a_lone_giant_runs() -> None:
    ledger = Ledger(Capacity(max_kv_tokens=100))
    assert ledger.submit(entry("giant", kv=500), 0) == Admitted()
    assert ledger.submit(entry("small", kv=1), 0) == Queued()
    assert [e.rid for e in ledger.finish("giant", 1)] == ["small"]


def test_suspects_one_at_a_time_and_others_pass_them() -> None:
    ledger = Ledger(Capacity())
    assert ledger.submit(entry("s1", suspect=True), 0) == Admitted()
    assert ledger.submit(entry("s2", suspect=True), 0) == Queued()
    assert ledger.submit(entry("x"), 0) == Admitted()
    assert [e.rid for e in ledger.finish("s1", 1)] == ["s2"]


def test_tier_cap_and_expiry() -> None:
    ledger = Ledger(Capacity(), (TierShare("t", 0.5, max_running=1),))
    assert ledger.submit(entry("a"), 0) == Admitted()
    assert ledger.submit(entry("b"), 0) == Queued()
    assert ledger.submit(entry("c", tier="u"), 0) == Admitted()
    assert ledger.expire(4.9) == []
    assert [e.rid for e in ledger.expire(5)] == ["b"]
    assert ledger.finish("a", 6) == []


def test_a_moved_stream_passes_caps_and_queues_but_not_the_kv_capacity() -> None:
    ledger = Ledger(Capacity(max_running=1, max_kv_tokens=100), (TierShare("t", 0.5, max_running=1),))
    assert ledger.submit(entry("a"), 0) == Admitted()
    assert ledger.submit(entry("new"), 0) == Queued()
    assert ledger.submit(entry("moved", Admission.BACKGROUND, moved=True), 0) == Admitted()
    assert ledger.submit(entry("wide", Admission.BACKGROUND, kv=95, moved=True), 0) == Queued()
    assert ledger.finish("a", 1) == [], "the KV of the moved one leaves no room, and new work does not pass it"
    assert [e.rid for e in ledger.finish("moved", 2)] == ["wide"]
    assert [e.rid for e in ledger.finish("wide", 3)] == ["new"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "finish", "expire", "empty", "clear"]),
            st.integers(0, 9),
            st.sampled_from(list(Admission)),
            st.sampled_from(["a", "b"]),
            st.booleans(),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_sums_that_it_keeps_are_those_of_what_runs(story: list[tuple[str, int, Admission, str, bool, bool]]) -> None:
    ledger = Ledger(Capacity(4, 300, 0.0, 5), (TierShare("a", 0.5, 2),))
    for now, (what, i, admission, tier, suspect, moved) in enumerate(story):
        waiting = {e.rid for q in ledger._queues for e in q}
        if what == "submit" and str(i) not in ledger.running and str(i) not in waiting:
            ledger.submit(Entry(str(i), tier, admission, 20 * (i + 1), float(now), now + 9.0, suspect, moved), float(now))
        elif what == "finish":
            ledger.finish(str(i), float(now))
        elif what == "expire":
            ledger.expire(float(now))
        elif what == "empty":
            ledger.empty_queues()
        elif what == "clear":
            ledger.clear()
        runs, waits = list(ledger.running.values()), [e for q in ledger._queues for e in q]
        assert ledger.kv_tokens == sum(e.kv_tokens for e in runs)
        assert ledger._suspects == sum(e.suspect for e in runs) <= 1
        assert all(ledger._of_tier.get(t, 0) == sum(e.tier == t for e in runs) for t in "ab")
        assert ledger._moved_waiting == sum(e.moved for e in waits)
        assert sum(not e.moved for e in runs) <= 4
        free = [e for e in sorted(waits, key=lambda e: not e.moved) if not ledger._held(e)]  # the rule, spelled out
        assert ledger.startable() is (free[0] if free and not ledger._blocked(free[0]) else None)
