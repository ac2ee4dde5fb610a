"""Whatever happens to a stream, its client gets each token once and in order."""

import zlib
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.routing import (
    Abort,
    AdmissionClass,
    ClientGone,
    Crashed,
    Deliver,
    Done,
    Fail,
    Finished,
    GroupView,
    Moved,
    NodeLost,
    Refused,
    Retried,
    Retry,
    Routes,
    Stream,
    Submit,
    Tokens,
    decide,
)

LENGTH = 20
GROUPS = tuple(GroupView(("a", f"g{i}"), 1, True, frozenset(), capacity=4) for i in range(3))


def next_token(prefix: list[int]) -> int:
    return zlib.crc32(repr(prefix).encode()) % 1000


def whole() -> list[int]:
    out: list[int] = []
    while len(out) < LENGTH:
        out.append(next_token(out))
    return out


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["step", "step", "step", "moved", "lost", "refused", "crashed", "stale", "none"]), max_size=60))
def test_no_token_lost_none_repeated(story: list[str]) -> None:
    s, got, now = Stream("t", False, 0.0), list[int](), 0.0
    engine: list[int] | None = None
    commands = s.start(GROUPS, now)
    for what in [*story, *["step"] * 200]:
        now += 0.1
        for c in commands:
            if isinstance(c, Submit):
                assert c.resume == len(got)
                engine = list(got)
            elif isinstance(c, Deliver):
                got += c.ids
            elif isinstance(c, Done):
                assert got == whole()
                return
            elif isinstance(c, Fail):
                assert got == whole()[: len(got)]
                return
        if any(isinstance(c, Retry) for c in commands):
            commands = s.handle(Retried(), GROUPS, now)
            continue
        view = () if what == "none" else GROUPS
        if what == "moved":
            commands = s.handle(Moved(s.hop, ((("a", "g1"), 2),)), view, now)
        elif what == "none":
            commands = s.handle(Moved(s.hop), view, now)
        elif what == "lost":
            commands = s.handle(NodeLost(s.hop), view, now)
        elif what == "refused":
            commands = s.handle(Refused(s.hop), view, now)
        elif what == "crashed":
            commands = s.handle(Crashed(s.hop), view, now)
        elif what == "stale":
            commands = s.handle(Tokens(s.hop - 1, (1, 2, 3)), view, now)
            assert commands == []
        elif engine is not None:
            engine.append(next_token(engine))
            commands = s.handle(Tokens(s.hop, (engine[-1],)), view, now)
            if len(engine) == LENGTH:
                commands += s.handle(Finished(s.hop), view, now)
    raise AssertionError("the stream did not end")


def test_the_second_crash_fails_it_alone() -> None:
    s = Stream("t", False, 0.0)
    s.start(GROUPS, 0.0)
    again = s.handle(Crashed(s.hop), GROUPS, 1.0)
    assert isinstance(again[0], Submit)
    assert again[0].suspect
    failed = s.handle(Crashed(s.hop), GROUPS, 2.0)
    assert isinstance(failed[0], Fail)
    assert failed[0].status == 500


def test_full_everywhere_is_429_with_retry_after() -> None:
    s = Stream("t", False, 0.0)
    s.start(GROUPS, 0.0)
    commands = []
    for i in range(3):
        commands = s.handle(Refused(s.hop, 700), GROUPS, float(i))
    assert commands == [Fail(429, "every group of this pool is full; try again later", 700)]


def test_a_client_that_left_is_aborted_where_it_runs() -> None:
    s = Stream("t", False, 0.0)
    first = s.start(GROUPS, 0.0)[0]
    assert isinstance(first, Submit)
    assert s.handle(ClientGone(), GROUPS, 1.0) == [Abort(1, first.group)]
    assert s.handle(Tokens(1, (1,)), GROUPS, 2.0) == []


def test_the_least_loaded_group_of_the_tier_is_feasible_until_it_is_full() -> None:
    meant = GroupView(("a", "x"), 1, True, frozenset({"chat"}), running=1, capacity=2)
    other = GroupView(("a", "y"), 1, True, frozenset({"batch"}), running=0, capacity=2)
    choice = decide("chat", False, (other, meant))
    assert choice is not None
    assert choice.groups[0] == meant
    assert choice.admission is AdmissionClass.FEASIBLE
    full = GroupView(("a", "x"), 1, True, frozenset({"chat"}), running=2, capacity=2)
    worse = decide("chat", False, (other, full))
    assert worse is not None
    assert worse.admission is AdmissionClass.BEST_EFFORT
    assert decide("chat", False, (GroupView(("a", "x"), 1, False, frozenset()),)) is None


views = st.lists(
    st.builds(
        GroupView,
        st.tuples(st.just("a"), st.sampled_from(["g1", "g2", "g3", "g4", "g5"])),
        st.just(1),
        st.booleans(),
        st.sets(st.sampled_from(["t", "u"])).map(frozenset),
        st.integers(0, 4),
        st.integers(0, 2),
        st.integers(0, 4),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(views, st.sets(st.sampled_from(["g1", "g2", "g3"])), st.sampled_from(["t", "u", "v"]), st.booleans(), st.sampled_from(["", "g2"]))
def test_kept_routes_decide_like_a_view_looked_at_afresh(news: list[GroupView], avoid: set[str], tier: str, back: bool, gone: str) -> None:
    routes, last = Routes(), dict[tuple[str, str], GroupView]()
    for g in news:  # later news of a group replace earlier ones
        routes.put(g)
        last[g.key] = g
    routes.remove(("a", gone))
    last.pop(("a", gone), None)
    if last:
        key = min(last)
        routes.submitted(key)
        last[key] = replace(last[key], running=last[key].running + 1)
    avoided = frozenset(("a", k) for k in avoid)
    assert decide(tier, back, routes, avoided) == decide(tier, back, tuple(last.values()), avoided)
