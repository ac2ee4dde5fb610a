from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum import flip as f
from nitsum.layout import FlipMode, Group, Layout

GPUS = tuple(f"g{i}" for i in range(4))


def group(tp: int, first: int, pool: str = "p") -> Group:
    return Group(f"{pool}-tp{tp}-{first}", f"{pool}-tp{tp}-{first}", pool, "m", tp, GPUS[first : first + tp])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    groups, at = [], 0
    while at < len(GPUS):
        tp = draw(st.sampled_from([n for n in (1, 2, 4) if at % n == 0 and at + n <= len(GPUS)]))
        if draw(st.integers(0, 4)):
            groups.append(group(tp, at, draw(st.sampled_from(["p", "q"]))))
        at += tp
    return Layout(tuple(groups))


@settings(max_examples=300, deadline=None)
@given(layouts(), layouts(), st.sampled_from(FlipMode), st.data())
def test_every_order_of_events_ends_and_never_two_awake_on_a_gpu(a: Layout, b: Layout, mode: FlipMode, data: st.DataObject) -> None:
    now = 0.0
    flip = f.Flip(a, b, mode, 7, f.Deadlines(let_finish_s=1.0))
    awake = {g.engine_id: g.gpu_uuids for g in a.groups}
    gpus = {g.engine_id: g.gpu_uuids for g in (*a.groups, *b.groups)}
    dead = frozenset(data.draw(st.sets(st.sampled_from(sorted(gpus)), max_size=1))) if gpus else frozenset()
    for e in dead:
        awake.pop(e, None)
    todo: list[f.Command] = flip.handle(f.FlipRequested(dead), now)
    opened: f.OpenGroups | None = None
    ended: set[str] = set(dead)
    for _ in range(200):
        if flip.ended:
            break
        choices: list[object] = [*todo]
        if flip.deadline is not None:
            choices.append("late")
        if flip.state is f.FlipState.ENDING:
            choices.append("streams ended")
        if gpus and (awake or todo):
            choices.append("crash")
        assert choices, f"stuck in {flip.state}"
        what = data.draw(st.sampled_from(choices))
        event: f.Event
        if what == "late":
            assert flip.deadline is not None
            now = flip.deadline
            event = f.DeadlinePassed()
        elif what == "streams ended":
            event = f.StreamsEnded()
        elif what == "crash":
            engine = data.draw(st.sampled_from(sorted(gpus)))
            awake.pop(engine, None)
            ended.add(engine)
            todo = [c for c in todo if not (isinstance(c, f.ParkEngine | f.WakeEngine | f.KillEngine) and c.engine_id == engine)]
            event = f.EngineEnded(engine)
        else:
            assert not isinstance(what, str)
            todo.remove(what)  # type: ignore[arg-type]
            match what:
                case f.CloseGroups(groups, successors, _, epoch):
                    assert epoch == 8
                    assert len(groups) == len(successors)
                    for g, ids in zip(groups, successors, strict=True):
                        assert set(ids) == {s.group_id for s in b.groups if s.pool == g.pool}
                    event = f.GroupsClosed()
                case f.AbortStreams():
                    event = f.StreamsEnded()
                case f.ParkEngine(engine):
                    awake.pop(engine, None)
                    event = f.EngineParked(engine)
                case f.WakeEngine(engine):
                    busy = {u for e, us in awake.items() if e != engine for u in us}
                    assert not busy & set(gpus[engine]), f"{engine} wakes on a GPU in use"
                    awake[engine] = gpus[engine]
                    event = f.EngineWoken(engine)
                case f.KillEngine(engine):
                    awake.pop(engine, None)
                    todo = [c for c in todo if getattr(c, "engine_id", "") != engine]
                    event = f.EngineEnded(engine)
                case f.OpenGroups():
                    opened = what
                    event = f.GroupsOpened()
        todo += flip.handle(event, now)
    assert flip.ended, flip.state
    serves = {g.engine_id for g in (flip.opening if flip.state is f.FlipState.DONE else flip.closing)}
    touched = {g.engine_id for g in (*flip.closing, *flip.opening)}
    if flip.state is f.FlipState.FAILED:
        assert serves - awake.keys(), "A is whole, yet the flip failed"
    else:
        assert serves - ended <= awake.keys(), flip.state
    assert touched & awake.keys() <= serves, "something is awake that no group needs"
    if opened is not None:
        assert {g.group_id for g in (*opened.groups, *opened.failed)} <= {g.group_id for g in (*a.groups, *b.groups)}


def test_untouched_groups_are_left_alone() -> None:
    a = Layout((group(1, 0), group(1, 1), group(2, 2)))
    flip = f.Flip(a, Layout((group(2, 0), group(2, 2))), FlipMode.ABORT, 1, f.Deadlines())
    assert [g.group_id for g in flip.closing] == ["p-tp1-0", "p-tp1-1"]
    assert [g.group_id for g in flip.opening] == ["p-tp2-0"]


def test_b_does_not_wake_so_a_does() -> None:
    a, b = Layout((group(1, 0), group(1, 1))), Layout((group(2, 0),))
    flip = f.Flip(a, b, FlipMode.ABORT, 1, f.Deadlines(wake_s=3))
    flip.handle(f.FlipRequested(), 0)
    flip.handle(f.GroupsClosed(), 0)
    flip.handle(f.StreamsEnded(), 0)
    flip.handle(f.EngineParked("p-tp1-0"), 0)
    assert flip.handle(f.EngineParked("p-tp1-1"), 1) == [f.WakeEngine("p-tp2-0")]
    assert flip.handle(f.DeadlinePassed(), 3.9) == []
    assert flip.handle(f.DeadlinePassed(), 4) == [f.KillEngine("p-tp2-0")]
    assert flip.handle(f.EngineEnded("p-tp2-0"), 4) == [f.WakeEngine("p-tp1-0"), f.WakeEngine("p-tp1-1")]
    flip.handle(f.EngineWoken("p-tp1-0"), 5)
    (opened,) = flip.handle(f.EngineWoken("p-tp1-1"), 5)
    assert isinstance(opened, f.OpenGroups)
    assert opened.epoch == 3
    assert opened.gone == b.groups
    flip.handle(f.GroupsOpened(), 5)
    assert flip.state is f.FlipState.REVERTED
