"""Whatever happens to a stream, its client gets each token once and in order."""

import zlib
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.layout import Role
from nitsum.routing import (
    FROM_STORE,
    GAP,
    HOPS_MAX,
    RETRY_S_MAX,
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
    Warm,
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


EVENTS = ["step", "step", "step", "finish", "moved", "moved to", "lost", "refused", "fatal", "crashed", "late", "late end", "time"]
VIEWS = st.lists(st.sampled_from(GROUPS), max_size=3, unique=True).map(tuple)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(EVENTS), st.floats(0, 20), VIEWS, st.integers(0, 5)), max_size=120),
    st.sampled_from(["nothing serves", "moves on and on", "client leaves"]),
)
def test_every_interleaving_keeps_order_bounds_and_one_end(story: list[tuple[str, float, tuple[GroupView, ...], int]], end: str) -> None:
    """Engines say anything, groups come and go, time passes; in the end all is lost for good: it ends by itself, or with its client."""
    s, got, now = Stream("t", False, 0.0), list[int](), 0.0
    made: list[int] = []
    commands, ended, submits, crashes, waits = s.start(GROUPS, now), 0, 0, 0, False

    def carry(commands: list[Any]) -> None:
        nonlocal got, ended, submits, waits, made
        waits = False
        for c in commands:
            assert not ended, "something after the end"
            if isinstance(c, Submit):
                assert c.resume == len(got)
                assert c.suspect == (crashes > 0)
                assert c.hop == s.hop
                made, submits = list(got), submits + 1
                assert submits <= HOPS_MAX
            elif isinstance(c, Deliver):
                got += c.ids
                submits = 0
            elif isinstance(c, Retry):
                assert 0 < c.after_s <= RETRY_S_MAX
                waits = True
            elif isinstance(c, Fail | Done):
                ended += 1
                assert not isinstance(c, Fail) or c.status != 429 or not got, "a stream that has begun is not shed"
        assert waits == (s.group is None and not s.ended)

    def hop_event(what: str, back: int) -> Any:
        hop = s.hop
        match what:
            case "moved":
                return Moved(hop)
            case "moved to":
                return Moved(hop, ((("a", f"g{back % 3}"), 2),))
            case "lost":
                return NodeLost(hop)
            case "refused":
                return Refused(hop, 100 * back)
            case "fatal":
                return Refused(hop, fatal="bad")
            case "late":
                return Tokens(hop - 1 - back, (666,))
            case "late end":
                return [Finished, Crashed, NodeLost, Moved][back % 4](hop - 1 - back)
            case "finish":
                return Finished(hop)
        return Crashed(hop)

    carry(commands)
    for what, after_s, view, back in story:
        now += after_s
        if what == "time" or waits:
            carry(s.handle(Retried(), view, now))
        elif what == "step":
            if s.group is not None and not s.ended:
                made.append(next_token(made))
                carry(s.handle(Tokens(s.hop, (made[-1],)), view, now))
        else:
            crashes += what == "crashed" and s.group is not None and not s.ended
            before = list(got)
            carry(s.handle(hop_event(what, back), view, now))
            assert got == before
    if end != "client leaves":
        for _ in range(400):
            now += 1.0
            away = Moved(s.hop, ((("a", "g1"), 2),)) if end == "moves on and on" else NodeLost(s.hop)
            carry(s.handle(Retried(), (), now) if s.group is None else s.handle(away, (), now))
            if s.ended:
                break
        assert ended == 1
    elif not s.ended:
        left = s.handle(ClientGone(), (), now)
        assert all(isinstance(c, Abort) and c.hop == s.hop for c in left)
        assert ended == 0
    expected: list[int] = []
    while len(expected) < len(got):
        expected.append(next_token(expected))
    assert got == expected
    assert all(s.handle(e, GROUPS, now) == [] for e in (Tokens(s.hop, (1,)), Finished(s.hop), Retried(), ClientGone()))


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
        st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["g1", "g2", "g3"])),
        st.integers(1, 2),
        st.booleans(),
        st.sets(st.sampled_from(["t", "u"])).map(frozenset),
        st.integers(0, 4),
        st.sampled_from([0, 0, 1, 2]),
        st.integers(0, 6),
        st.booleans(),
        st.sampled_from(Role),
    ),
    max_size=12,
)
keys = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["g1", "g2"]))
warm_groups = st.lists(st.builds(Warm, keys, st.integers(1, 2), st.floats(0.01, 1)), max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    views,
    st.sets(st.sampled_from(["g1", "g2", "g3"])),
    st.sampled_from(["t", "u", "v"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "g2"]),
    warm_groups,
)
def test_kept_routes_decide_like_a_view_looked_at_afresh(
    news: list[GroupView], avoid: set[str], tier: str, back: bool, started: bool, gone: str, warm: tuple[Warm, ...]
) -> None:
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
    assert {(n, g.key) for n in "abc" for g in routes.on_node(n)} == {(key[0], key) for key in last}
    assert len(routes._nodes) == len({n for n, _ in last}), "nothing is kept of a node that is gone"
    avoided = frozenset(("a", k) for k in avoid)
    assert decide(tier, back, routes, avoided, started, warm) == decide(tier, back, tuple(last.values()), avoided, started, warm)


near = st.lists(  # one thing is wrong with many of these, and all are about as full
    st.tuples(
        st.sampled_from([("a", "g1"), ("a", "g2"), ("b", "g1"), ("b", "g2")]),
        st.integers(2, 5),
        st.sampled_from(["", "", "", "full", "queue", "hint", "closed", "role", "tier", "epoch"]),
    ).map(
        lambda x: GroupView(
            x[0],
            2 if x[2] == "epoch" else 1,
            x[2] != "closed",
            frozenset({"u"} if x[2] == "tier" else {"t"}),
            x[1],
            int(x[2] == "queue"),
            x[1] if x[2] == "full" else 8,
            x[2] == "hint",
            Role.DECODE if x[2] == "role" else Role.MIXED,
        )
    ),
    min_size=3,
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(views, near), st.sets(keys, max_size=1), st.sampled_from(["t", "u"]), st.booleans(), st.booleans(), warm_groups)
def test_a_prefix_never_takes_a_request_from_a_group_that_would_start_it_to_one_that_would_not(
    news: list[GroupView], avoid: set[tuple[str, str]], tier: str, back: bool, started: bool, warm: tuple[Warm, ...]
) -> None:
    """Nor to one that is much fuller, nor of another class."""
    view = tuple({g.key: g for g in news}.values())
    without, choice = (decide(tier, back, view, frozenset(avoid), started, w) for w in ((), warm))
    if without is None or choice is None:
        assert choice == without
        return
    least, chosen = without.groups[0], choice.groups[0]
    assert choice.admission is without.admission
    if chosen is not least:
        assert least.feasible
        assert not least.hint
        assert chosen.feasible
        assert not chosen.queued
        assert not chosen.hint
        assert chosen.serving
        assert chosen.key not in avoid
        assert chosen.role.suits(started)
        assert not chosen.tiers or tier in chosen.tiers
        there = [w.share * (1.0 if w[:2] == (chosen.key, chosen.epoch) else FROM_STORE) for w in warm if w.key[0] == chosen.key[0]]
        assert chosen.load <= least.load + GAP * max(there)
        assert choice.groups[1:] == (least,), "the next to be asked"


def test_the_longest_prefix_goes_first_on_its_group_then_on_its_node_unless_that_is_much_fuller() -> None:
    def at(node: str, group: str, running: int, **more: Any) -> GroupView:
        return GroupView((node, group), 1, True, frozenset(), running, capacity=100, **more)

    def first(view: tuple[GroupView, ...], *warm: Warm) -> tuple[str, str]:
        chosen = [decide("t", False, v, warm=warm) for v in (view, Routes(view))]
        assert chosen[0] == chosen[1] is not None
        return chosen[0].groups[0].key

    full, half = (Warm(("b", "g1"), 1, share) for share in (1.0, 0.5))
    idle, mate = at("a", "g1", 10), at("b", "g2", 10)
    assert first((idle, at("b", "g1", 35)), full) == ("b", "g1")
    assert first((idle, at("b", "g1", 36)), full) == ("a", "g1"), "more than a quarter of what it can run fuller"
    assert first((idle, at("b", "g1", 22)), half) == ("b", "g1")
    assert first((idle, at("b", "g1", 23)), half) == ("a", "g1"), "half of the prompt is worth half as much"
    assert first((idle, at("b", "g1", 12), mate), full) == ("b", "g1")
    assert first((idle, at("b", "g1", 36), mate), full) == ("b", "g2"), "the node's store has it too"
    assert first((idle, replace(at("b", "g1", 22), epoch=2)), full) == ("b", "g1"), "another engine since: the node alone has it"
    assert first((idle, replace(at("b", "g1", 23), epoch=2)), full) == ("a", "g1")
    assert first((idle, at("b", "g1", 12, queued=1)), full) == ("a", "g1"), "it would wait there"
    assert first((idle, at("b", "g1", 12), at("c", "g1", 12)), Warm(("c", "g1"), 1, 0.8), half) == ("c", "g1"), "the longest first"
    assert first((idle,), full) == ("a", "g1"), "gone"
    assert first((idle, replace(at("b", "g1", 12), role=Role.DECODE)), full) == ("a", "g1"), "a prompt would stall it"
    assert first((idle, replace(at("b", "g1", 12), tiers=frozenset({"u"}))), full) == ("a", "g1"), "meant for another tier"
    nearly, brim = (replace(at(n, "g1", r), capacity=5) for n, r in (("a", 4), ("b", 5)))
    assert first((nearly, brim), full) == ("a", "g1"), "full, be it only a fifth fuller"
    refused = decide("t", False, (idle, at("b", "g1", 12)), frozenset({("b", "g1")}), warm=(full,))
    assert refused is not None
    assert refused.groups[0] == idle
    unlimited = tuple(replace(g, capacity=0) for g in (idle, at("b", "g1", 11)))
    assert first(unlimited, full) == ("a", "g1"), "who knows what is safe there"


def test_new_requests_go_where_prefill_is_and_started_ones_where_decode_is() -> None:
    p, d, m = (GroupView(("a", r), 1, True, frozenset(), running=3, capacity=3, role=r) for r in (Role.PREFILL, Role.DECODE, Role.MIXED))
    idle = replace(m, running=0)
    for view in ((p, d), Routes((p, d))):
        new, started = decide("t", False, view), decide("t", False, view, started=True)
        assert new is not None
        assert started is not None
        assert (new.groups, started.groups) == ((p,), (d, p)), "full or not: a prompt would stall what only decodes"
        assert new.admission is AdmissionClass.BEST_EFFORT, "room to decode is none for a prompt"
    for view in ((p, d, idle), Routes((p, d, idle))):
        choices = [decide("t", False, view, started=s) for s in (False, True)]
        assert [c and c.groups for c in choices] == [(idle, p), (idle, d)]


def test_what_only_decodes_takes_new_requests_where_nothing_else_serves_them() -> None:
    free = GroupView(("a", "d"), 1, True, frozenset({"t"}), capacity=3, role=Role.DECODE)
    p = GroupView(("a", "p"), 1, True, frozenset({"t"}), capacity=3, role=Role.PREFILL)
    elsewhere, gone, closed = replace(p, tiers=frozenset({"u"})), replace(p, hint=True), replace(p, serving=False)
    for others in ((), (elsewhere,), (closed,)):
        for view in ((free, *others), Routes((free, *others))):
            choice = decide("t", False, view)
            assert choice is not None
            assert (choice.groups, choice.admission) == ((free,), AdmissionClass.FEASIBLE)
    choice = decide("t", False, (free, gone))
    assert choice is not None
    assert set(choice.groups) == {free, gone}, "a group that its node does not list any more may not prefill"


def test_a_new_request_that_prefill_refuses_is_shed_and_not_decoded_in_its_place() -> None:
    p, d = (GroupView(("a", r), 1, True, frozenset(), role=r) for r in (Role.PREFILL, Role.DECODE))
    for view in ((p, d), Routes((p, d))):
        s = Stream("t", False, 0.0)
        s.start(view, 0.0)
        (answer,) = s.handle(Refused(1, 200), view, 0.1)
        assert isinstance(answer, Fail)
        assert (answer.status, answer.retry_after_ms) == (429, 200)
        lost = Stream("t", False, 0.0)
        lost.start(view, 0.0)
        assert [type(c) for c in lost.handle(NodeLost(1), view, 0.1)] == [Retry], "its group may be back in a moment"


def test_a_stream_that_moved_takes_the_successor_that_decodes() -> None:
    p, d = (GroupView(("a", r), 1, True, frozenset(), running=n, role=r) for r, n in ((Role.PREFILL, 0), (Role.DECODE, 3)))
    successors = ((p.key, 2), (d.key, 2))
    for view in ((p, d), Routes((p, d))):
        s = Stream("t", False, 0.0)
        assert s.start(view, 0.0) == [Submit(1, p.key, 1, AdmissionClass.FEASIBLE, 0, False)]
        s.handle(Tokens(1, (5,)), view, 0.1)
        assert s.handle(Moved(1, successors), view, 0.2) == [Submit(2, d.key, 2, AdmissionClass.FEASIBLE, 1, False)]
