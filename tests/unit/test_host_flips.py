"""Flips, crashes and restarts of one host over fake engines. The world checks ledgers and who is awake at every turn of the event loop."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host import engines as engines_module
from nitsum_host import flips as flips_module
from nitsum_host import streams as streams_module
from nitsum_host.engines import folder_name
from nitsum_host.leftovers import end_all
from nitsum_host.testing.fake_engine import FakeEngine
from nitsum_host.testing.world import World, world

Outcome, Report, State = agent_pb2.FlipReport, agent_pb2.EngineReport, types_pb2


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def streams(w: World, count: int = 4, tokens: int = 150) -> None:
    for i in range(count):
        w.gateway.start(f"s{i}", tokens)


def states(w: World) -> dict[str, int]:
    return {i: g.state for i, g in w.node.groups.items()}


def no_wake(engine: FakeEngine) -> None:
    engine.wakes = False


def no_start(engine: FakeEngine) -> None:
    engine.starts = False


def held(engine: FakeEngine) -> None:
    engine.may_start.clear()


async def test_streams_cross_a_flip_and_come_back(w: World) -> None:
    streams(w)
    await asyncio.sleep(0.02)
    for tp in (2, 1):
        report = await w.carried_out(w.directive(tp))
        assert report.flip.outcome == Outcome.OUTCOME_DONE
        assert not report.problem
        await asyncio.sleep(0.01)
    await w.gateway.all_done()
    assert max(w.gateway.hops.values()) >= 3


async def test_streams_may_end_where_they_run_but_not_for_longer_than_they_are_let(w: World) -> None:
    w.steps_s = 0.002
    w.gateway.start("short", 60)
    w.gateway.start("long", 2000)
    await asyncio.sleep(0.02)
    directive = w.directive(2)
    directive.mode, directive.let_finish_ms = types_pb2.FLIP_MODE_LET_FINISH, 400
    began = asyncio.get_running_loop().time()
    report = await w.carried_out(directive)
    assert asyncio.get_running_loop().time() - began >= 0.4
    assert report.flip.outcome == Outcome.OUTCOME_DONE
    await w.gateway.all_done()
    assert (w.gateway.hops["short"], w.gateway.hops["long"], report.flip.streams_moved) == (1, 2, 1)


async def test_a_flip_goes_on_as_soon_as_all_streams_have_ended(w: World) -> None:
    streams(w, tokens=30)
    await asyncio.sleep(0.01)
    directive = w.directive(2)
    directive.mode, directive.let_finish_ms = types_pb2.FLIP_MODE_LET_FINISH, 60_000
    report = await asyncio.wait_for(w.carried_out(directive), 20)
    await w.gateway.all_done()
    assert (set(w.gateway.hops.values()), report.flip.streams_moved) == ({1}, 0)


async def test_limits_reach_the_engine_as_its_group_opens_and_as_they_drift(w: World) -> None:
    """That an open group's engine never has others is among the world's checks."""

    def budgets() -> dict[str, int]:
        return {i: w.engine(i).limits.prefill_tokens_per_step for i in ("e1-0", "e1-1", "e2-0")}

    assert budgets() == {"e1-0": 100, "e1-1": 100, "e2-0": 0}
    epoch = w.node.epoch
    await w.carried_out(w.directive(1))
    assert (budgets(), w.node.epoch) == ({"e1-0": 200, "e1-1": 200, "e2-0": 0}, epoch), "without a flip"
    await w.carried_out(w.directive(2))
    assert budgets()["e2-0"] == 300
    w.engine("e2-0").crash()
    await w.until(lambda: len(w.made["e2-0"]) == 2 and states(w) == {"g2-0": State.GROUP_STATE_OPEN})
    assert budgets()["e2-0"] == 300, "the engine that came back"


async def test_a_flip_while_an_engine_of_a_comes_back(w: World) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    w.arrange("e1-0", held)
    w.engine("e1-0").crash()
    await w.until(lambda: len(w.made["e1-0"]) == 2)
    report = await w.carried_out(w.directive(2))
    assert report.flip.outcome == Outcome.OUTCOME_DONE
    w.engine("e1-0").may_start.set()
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_PARKED)
    assert w.slot("e1-0").message == "not warmed up: its GPUs are in use"
    assert states(w) == {"g2-0": State.GROUP_STATE_OPEN}
    await w.gateway.all_done()


async def test_a_flip_waits_for_a_warm_up_on_its_gpus(w: World) -> None:
    w.steps_s = 0.01
    w.engine("e1-0").crash()
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_WARMING)
    report = await w.carried_out(w.directive(2))
    assert report.flip.outcome == Outcome.OUTCOME_DONE
    assert w.holders == dict.fromkeys(("g0", "g1"), "e2-0#0")


async def test_an_engine_that_comes_back_waits_for_the_flip(w: World) -> None:
    """Its group had failed when it ended; when it is up, the group is closing and must not be woken under B."""
    streams(w)
    await asyncio.sleep(0.01)
    w.engine("e1-1").parks = False
    w.arrange("e1-0", held)
    w.engine("e1-0").crash()
    await w.until(lambda: len(w.made["e1-0"]) == 2)
    assert (await w.apply(w.directive(2))).WhichOneof("answer") == "accepted"
    await w.until(lambda: w.host.report().flip.state == "Parking")
    w.engine("e1-0").may_start.set()  # up before B wakes
    assert w.host.running is not None
    await w.host.running
    assert w.host.report().flip.outcome == Outcome.OUTCOME_DONE
    await w.until(lambda: w.slot("e1-0").state == w.slot("e1-1").state == Report.STATE_PARKED)
    assert w.slot("e1-1").restarts == 1  # it did not park in time
    await w.gateway.all_done()


async def test_b_that_is_coming_back_counts_as_dead(w: World) -> None:
    streams(w)
    w.arrange("e2-0", held)
    w.engine("e2-0").crash()
    await w.until(lambda: len(w.made["e2-0"]) == 2)
    report = await w.carried_out(w.directive(2))
    assert report.flip.outcome == Outcome.OUTCOME_REVERTED
    assert report.problem == "flip Reverted: engines e2-0 are not running; nothing was touched"
    w.engine("e2-0").may_start.set()
    await w.until(lambda: w.slot("e2-0").state == Report.STATE_PARKED)
    assert (await w.carried_out(w.directive(2))).flip.outcome == Outcome.OUTCOME_DONE
    await w.gateway.all_done()


async def test_a_crashes_while_its_streams_finish(w: World) -> None:
    streams(w, tokens=200)
    await asyncio.sleep(0.01)
    d = w.directive(2, mode=types_pb2.FLIP_MODE_LET_FINISH, let_finish_ms=5000)
    await w.apply(d)
    await w.until(lambda: w.host.report().flip.state == "Ending")
    for engine_id in ("e1-0", "e1-1"):
        w.engine(engine_id).crash()
    assert w.host.running is not None
    await w.host.running
    assert w.host.report().flip.outcome == Outcome.OUTCOME_DONE
    await w.gateway.all_done()


@pytest.mark.parametrize("lingers_s", [0.0, 0.05])
async def test_b_crashes_while_waking_and_a_wakes_when_it_is_gone(w: World, lingers_s: float) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    b = w.engine("e2-0")
    b.wakes, b.lingers_s = False, lingers_s
    await w.apply(w.directive(2))
    await w.until(lambda: b.awake)
    b.crash()
    assert w.host.running is not None
    await w.host.running
    report = w.host.report()
    assert report.flip.outcome == Outcome.OUTCOME_REVERTED
    assert report.problem == "flip Reverted: e2-0 ended while waking"
    assert report.applied_operation_id == "op1"
    assert set(states(w)) == {"g1-0", "g1-1"}
    await w.gateway.all_done()
    await w.until(lambda: w.slot("e2-0").state == Report.STATE_PARKED)
    assert (await w.carried_out(w.directive(2))).flip.outcome == Outcome.OUTCOME_DONE


async def test_one_of_b_ends_when_it_had_woken(w: World) -> None:
    """The flip hears of it only when its last process is gone: by then the others have woken, and groups open."""
    streams(w)
    await w.carried_out(w.directive(2))
    first, second = w.engine("e1-0"), w.engine("e1-1")
    first.lingers_s, second.wakes = 0.1, False
    await w.apply(w.directive(1))
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_AWAKE)
    first.crash()
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_FAILED)
    second.wakes = True
    await w.until(lambda: w.host.report().flip.outcome == Outcome.OUTCOME_DONE)
    assert states(w) == {"g1-0": State.GROUP_STATE_FAILED, "g1-1": State.GROUP_STATE_OPEN}
    await w.until(lambda: states(w)["g1-0"] == State.GROUP_STATE_OPEN)
    await w.gateway.all_done()


async def test_b_hangs_on_wake_is_killed_and_comes_back(w: World) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    w.engine("e2-0").wakes = False
    report = await w.carried_out(w.directive(2))
    assert report.flip.outcome == Outcome.OUTCOME_REVERTED
    assert "did not wake within" in report.problem
    await w.until(lambda: w.slot("e2-0").state == Report.STATE_PARKED)
    assert w.slot("e2-0").restarts == 1
    assert (await w.carried_out(w.directive(2))).flip.outcome == Outcome.OUTCOME_DONE
    await w.gateway.all_done()


async def test_a_that_hangs_on_park_is_killed_and_can_be_flipped_back_to(w: World) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    w.engine("e1-0").parks = False
    assert (await w.carried_out(w.directive(2))).flip.outcome == Outcome.OUTCOME_DONE
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_PARKED)
    assert (await w.carried_out(w.directive(1))).flip.outcome == Outcome.OUTCOME_DONE
    await w.gateway.all_done()


async def test_both_dead_heals_by_itself(w: World) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    for engine_id in ("e1-0", "e1-1"):
        w.engine(engine_id).parks = False
        w.arrange(engine_id, held)
    w.engine("e2-0").wakes = False
    d = w.directive(2)
    report = await w.carried_out(d)
    assert report.flip.outcome == Outcome.OUTCOME_FAILED
    assert set(states(w).values()) == {State.GROUP_STATE_FAILED}
    assert (await w.apply(d)).WhichOneof("answer") == "already_done"  # the same id is never a second flip
    for engine_id in ("e1-0", "e1-1"):
        w.engine(engine_id).may_start.set()
    await w.until(lambda: set(states(w).values()) == {State.GROUP_STATE_OPEN})
    await w.gateway.all_done()
    await w.until(lambda: w.slot("e2-0").state == Report.STATE_PARKED)
    report = await w.carried_out(w.directive(2))
    assert report.flip.outcome == Outcome.OUTCOME_DONE
    assert not report.problem


async def test_failed_then_the_same_layout_again_is_applied_and_comes_back(w: World) -> None:
    w.arrange("e1-0", no_start, no_start)
    w.engine("e1-0").crash()
    await w.until(lambda: states(w)["g1-0"] == State.GROUP_STATE_FAILED)
    report = await w.carried_out(w.directive(1))
    assert report.applied_operation_id == "op2"
    await w.until(lambda: states(w)["g1-0"] == State.GROUP_STATE_OPEN)
    assert w.slot("e1-0").restarts == 3


async def test_an_engine_that_does_not_stay_up_is_a_problem_until_it_does(w: World) -> None:
    w.arrange("e2-0", *[no_start] * 5)
    w.engine("e2-0").crash()
    await w.until(lambda: bool(w.host.report().problem))
    assert w.host.report().problem == "engine e2-0 does not stay up (5 starts in a row): it does not start"
    report = await w.carried_out(w.directive(1))  # names the engine: tried at once, not in five seconds
    await w.until(lambda: w.slot("e2-0").state == Report.STATE_PARKED)
    assert not w.host.report().problem
    assert report.applied_operation_id == "op2"


async def test_nothing_wakes_beside_an_engine_that_does_not_end(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    monkeypatch.setattr(engines_module, "END_S", 0.05)
    monkeypatch.setattr(engines_module, "END_AGAIN_S", 0.01)
    b = w.engine("e2-0")
    b.wakes, b.lingers_s = False, 60.0
    await w.apply(w.directive(2))
    await w.until(lambda: bool(w.host.report().problem))
    problem = "engine e2-0: its processes do not end (TimeoutError: ); its GPUs wait for them"
    assert w.host.report().problem == problem
    assert w.holders == dict.fromkeys(("g0", "g1"), "e2-0#0")
    assert w.host.report().flip.state == "Reverting"
    b.lingers_s = 0.0
    assert w.host.running is not None
    await w.host.running
    assert w.host.report().flip.outcome == Outcome.OUTCOME_REVERTED
    assert "do not end" not in w.host.report().problem
    await w.gateway.all_done()


async def test_a_directive_while_a_flip_runs(w: World) -> None:
    w.engine("e2-0").wakes = False
    running, other = w.directive(2), w.directive(1)
    answers = await asyncio.gather(*(w.apply(d) for d in (running, other, running)))
    assert [a.WhichOneof("answer") for a in answers] == ["accepted", "rejected", "already_done"]
    assert answers[1].rejected.reason == agent_pb2.ApplyResponse.Rejected.REASON_FLIP_RUNNING


async def test_a_reverted_flip_keeps_what_serves_though_the_directive_does_not_name_it(w: World) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    w.engine("e2-0").wakes = False
    report = await w.carried_out(w.directive(2, tps=(2,)))
    assert report.flip.outcome == Outcome.OUTCOME_REVERTED
    assert {"e1-0", "e1-1"} <= set(w.node.slots)
    await w.gateway.all_done()
    await w.until(lambda: w.slot("e2-0").state == Report.STATE_PARKED)
    report = await w.carried_out(w.directive(2, tps=(2,)))
    assert report.flip.outcome == Outcome.OUTCOME_DONE
    assert set(w.node.slots) == {"e2-0"}


async def test_residency_grows_and_shrinks_under_streams(w: World) -> None:
    streams(w, tokens=300)
    await w.carried_out(w.directive(1, tps=(1,)))
    assert set(w.node.slots) == {"e1-0", "e1-1"}
    report = await w.carried_out(w.directive(1))
    assert set(w.node.slots) == {"e1-0", "e1-1", "e2-0"}
    assert {e.engine.engine_id: e.message for e in report.engines}["e2-0"] == "not warmed up: its GPUs are in use"
    await w.gateway.all_done()
    assert set(w.gateway.hops.values()) == {1}


async def test_engines_of_a_directive_start_together_and_one_that_fails_keeps_none_down(w: World) -> None:
    await w.carried_out(w.directive(1, tps=(1,)))
    for engine_id in ("e1-0", "e1-1"):
        w.arrange(engine_id, held)
    w.arrange("e2-0", no_start)
    await w.apply(w.directive(1, path="/other"))
    both = {("e1-0", "/other", Report.STATE_STARTING), ("e1-1", "/other", Report.STATE_STARTING)}
    await w.until(lambda: {(i, s.engine.spec.model_path, s.state) for i, s in w.node.slots.items()} == both)  # neither waits for the other
    w.engine("e1-0").may_start.set()
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_PARKED)
    w.engine("e1-1").may_start.set()
    assert w.host.running is not None
    await w.host.running
    assert set(w.node.slots) == {"e1-0", "e1-1"}
    assert w.host.report().problem == "EngineEnded: it does not start"


async def test_another_checkpoint_under_the_same_ids_is_another_engine(w: World) -> None:
    report = await w.carried_out(w.directive(1, path="/other"))
    assert not report.problem
    assert {s.engine.spec.model_path for s in w.node.slots.values()} == {"/other"}
    assert set(states(w).values()) == {State.GROUP_STATE_OPEN}


async def test_drain_ends_streams_without_sending_them_back(w: World) -> None:
    from nitsum_api.host.v1 import host_pb2

    streams(w, tokens=100_000)
    await asyncio.sleep(0.01)
    await w.host.Drain(host_pb2.DrainRequest(grace_ms=20), None)  # type: ignore[arg-type]
    assert not w.node.streams
    assert w.host.report().draining
    await w.until(lambda: not w.engine("e1-0")._live)
    await asyncio.sleep(0.02)
    assert not w.gateway.refusals
    answer = await w.apply(w.directive(2))
    assert answer.rejected.reason == agent_pb2.ApplyResponse.Rejected.REASON_DRAINING


async def test_drain_in_the_middle_of_a_flip(w: World) -> None:
    from nitsum_api.host.v1 import host_pb2

    streams(w, tokens=100_000)
    await asyncio.sleep(0.01)
    w.engine("e2-0").wakes = False
    await w.apply(w.directive(2))
    await w.until(lambda: w.engine("e2-0").awake)
    await w.host.Drain(host_pb2.DrainRequest(grace_ms=0), None)  # type: ignore[arg-type]
    assert w.host.running is not None
    await w.host.running
    assert w.host.report().flip.outcome == Outcome.OUTCOME_REVERTED
    assert not w.node.streams


@pytest.mark.parametrize("state", ["Ending", "Parking", "Waking"])
async def test_stop_in_the_middle_of_a_flip_leaves_nothing(w: World, state: str) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    w.engine("e1-0").parks, w.engine("e2-0").wakes = state != "Parking", False
    await w.apply(w.directive(2, mode=types_pb2.FLIP_MODE_LET_FINISH, let_finish_ms=5000 if state == "Ending" else 0))
    await w.until(lambda: w.host.report().flip.state == state)
    await w.stop()
    assert all(e._ended for made in w.made.values() for e in made)


async def test_a_full_disk_stops_a_flip_before_it_begins_never_half_way(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    streams(w)
    write = w.journal.write

    def full(**entry: object) -> None:
        if entry.get("flip") in failing:
            raise OSError(28, "No space left on device")
        write(**entry)

    monkeypatch.setattr(w.journal, "write", full)
    failing: tuple[str, ...] = ("Closing",)
    report = await w.carried_out(w.directive(2))
    assert "No space left" in report.problem
    assert report.flip.outcome == Outcome.OUTCOME_REVERTED
    assert set(states(w).values()) == {State.GROUP_STATE_OPEN}
    failing = ("Ending", "Parking", "Waking", "Opening", "Done")
    assert (await w.carried_out(w.directive(2))).flip.outcome == Outcome.OUTCOME_DONE
    await w.gateway.all_done()


async def test_a_bug_half_way_ends_what_may_be_awake_and_a_comes_back(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    streams(w)
    await asyncio.sleep(0.01)
    with monkeypatch.context() as m:
        m.setattr(flips_module, "open_groups", lambda node, group_id: 1 / 0)
        report = await w.carried_out(w.directive(2))
    assert "ZeroDivisionError" in report.problem
    assert report.flip.outcome == Outcome.OUTCOME_FAILED
    await w.until(lambda: states(w) == dict.fromkeys(("g1-0", "g1-1"), State.GROUP_STATE_OPEN))
    await w.gateway.all_done()


async def test_a_bug_in_reading_an_engine_does_not_leave_its_streams_hanging(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    streams(w, count=2)
    with monkeypatch.context() as m:
        m.setattr(streams_module, "on_step", lambda node, deltas: 1 / 0)
        await w.until(lambda: w.slot("e1-0").state == Report.STATE_FAILED)
    await w.until(lambda: w.slot("e1-0").state == Report.STATE_AWAKE)


async def test_waking_out_of_turn_or_beside_another_is_refused(w: World) -> None:
    awake = w.engines.awake
    with pytest.raises(AssertionError, match="while e1-0, e1-1 may be awake"):
        await awake.wake(w.slot("e2-0"))
    with pytest.raises(AssertionError, match="out of turn"):
        await awake.wake(w.slot("e1-0"))


async def test_turns_name_who_has_the_gpus_and_let_others_pass(w: World) -> None:
    awake = w.engines.awake
    async with awake.turn("first", ["g0"]):
        async with awake.turn("elsewhere", ["g1"], 0.1):
            pass
        with pytest.raises(TimeoutError, match=r"second waited 0\.01 s for its GPUs, which are in use by first"):
            async with awake.turn("second", ["g0", "g1"], 0.01):
                pass
    async with awake.turn("third", ["g0", "g1"], 0.1):
        pass


async def test_an_engine_that_ends_awake_closes_its_interval_when_it_is_gone(tmp_path: Path) -> None:
    wake = {"t": 1.0, "event": "wake", "engine": "e", "gpus": ["g0"], "rank": 0, "pid": 9}
    path = tmp_path / "e" / "x" / "awake.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(wake) + "\n")
    await end_all(tmp_path / "e")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["wake", "park"]
    assert lines[1] == wake | {"event": "park", "ended": True, "t": lines[1]["t"]}
    await end_all(tmp_path / "e")
    assert len(path.read_text().splitlines()) == 2


def test_long_engine_ids_do_not_share_a_folder() -> None:
    tail = "x" * 50 + "-tp2-0"
    assert folder_name("default.chat-tp2-0") == "default.chat-tp2-0"
    assert folder_name("a." + tail) != folder_name("b." + tail)
    assert len(folder_name("a." + tail)) == 40
    assert "/" not in folder_name("../x")


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_it_heals_and_no_token_is_lost(w: World, seed: int) -> None:
    chance = random.Random(seed)
    for i in range(12):
        if i < 6:
            w.gateway.start(f"s{i}", chance.randrange(50, 150))
        for engine_id in chance.sample(sorted(w.node.slots), chance.randrange(2)):
            engine = w.engine(engine_id)
            engine.lingers_s = chance.choice((0.0, 0.02))
            trouble = chance.choice(("crash", "wake", "park", "start"))
            if trouble == "crash":
                engine.crash()
            elif trouble == "start":
                w.arrange(engine_id, no_start)
            else:
                setattr(engine, f"{trouble}s", False)
        await w.apply(w.directive(chance.choice((1, 2)), mode=chance.choice((types_pb2.FLIP_MODE_ABORT, types_pb2.FLIP_MODE_LET_FINISH))))
        await asyncio.sleep(chance.random() * 0.08)
    for engine in [e for made in w.made.values() for e in made]:
        engine.wakes = engine.parks = True
    async with asyncio.timeout(20):
        while (d := w.directive(2)).operation_id != w.host.applied:
            if (await w.apply(d)).WhichOneof("answer") == "accepted":
                assert w.host.running is not None
                await w.host.running
                assert "internal error" not in w.host.problem
                if w.host.applied == d.operation_id:
                    break
            await asyncio.sleep(0.02)
    await w.until(lambda: states(w) == {"g2-0": State.GROUP_STATE_OPEN})
    await w.gateway.all_done()
