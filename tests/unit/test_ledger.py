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
