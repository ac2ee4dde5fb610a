"""Carries a flip out: the machine's commands become work on engines and groups, their ends become its events.

It runs to its end in the host, whether the agent is there or not, and has its GPUs to itself meanwhile: an engine that comes back after a
crash waits for the end, one that is not up as the flip begins counts as dead.
"""

import asyncio
import logging
import time
from pathlib import Path

from nitsum import flip as machine
from nitsum.faults import FaultPoint
from nitsum.layout import FlipMode, Group, Layout
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.fault import maybe_die
from nitsum_api.types.v1 import types_pb2
from nitsum_host.engines import Engines
from nitsum_host.groups import abort_streams, close_groups, end_streams, make_known, open_groups, remove_group
from nitsum_host.journal import Journal
from nitsum_host.places import link
from nitsum_sglang.port import EngineEnded

log = logging.getLogger(__name__)
Outcome = agent_pb2.FlipReport.Outcome
Report = agent_pb2.EngineReport
TURN_S = 60.0
"""Longest wait for a warm-up that has the GPUs; then the flip is given up before it touched anything."""
OUTCOMES = {
    machine.FlipState.DONE: Outcome.OUTCOME_DONE,
    machine.FlipState.REVERTED: Outcome.OUTCOME_REVERTED,
    machine.FlipState.FAILED: Outcome.OUTCOME_FAILED,
}
DIES = {
    machine.FlipState.ENDING: FaultPoint.HOST_CLOSED,
    machine.FlipState.PARKING: FaultPoint.HOST_ENDED,
    machine.FlipState.WAKING: FaultPoint.HOST_PARKED,
    machine.FlipState.OPENING: FaultPoint.HOST_AWAKE,
}


class FlipRun:
    """One flip of the node. `report` is always current."""

    def __init__(
        self,
        engines: Engines,
        journal: Journal,
        state_dir: Path,
        operation_id: str,
        after: Layout,
        wires: dict[str, types_pb2.Group],
        mode: FlipMode,
        deadlines: machine.Deadlines,
    ) -> None:
        self.engines, self.node, self.journal, self.state_dir, self.wires = engines, engines.node, journal, state_dir, wires
        self.flip = machine.Flip(self.node.layout, after, mode, self.node.epoch, deadlines)
        self.report = agent_pb2.FlipReport(operation_id=operation_id, outcome=Outcome.OUTCOME_RUNNING)
        self.events: asyncio.Queue[machine.Event] = asyncio.Queue()
        self.work: dict[str, asyncio.Task[None]] = {}
        self.ending: tuple[str, ...] = ()
        self.parking: set[str] = set()
        self.touched = False

    @property
    def empty(self) -> bool:
        """There is nothing to do."""
        return not self.flip.closing and not self.flip.opening

    async def run(self) -> "Outcome.ValueType":
        """Raises TimeoutError or OSError when it could not begin; after any other error supervision brings A back."""
        gpus = {u for g in (*self.flip.closing, *self.flip.opening) for u in g.gpu_uuids}
        try:
            async with self.engines.awake.turn(f"flip {self.report.operation_id}", gpus, TURN_S):
                try:
                    return await self._run()
                except Exception:
                    if self.touched:
                        self._abandon()
                    raise
        except BaseException as e:
            self.report.outcome = Outcome.OUTCOME_FAILED if self.touched else Outcome.OUTCOME_REVERTED
            self.report.message = f"{type(e).__name__}: {e}" + ("" if self.touched else "; nothing was touched")
            raise
        finally:
            for task in self.work.values():
                task.cancel()

    async def _run(self) -> "Outcome.ValueType":
        self.events.put_nowait(machine.FlipRequested(frozenset(i for i in self.flip.engines if not self._up(i))))
        state, since = self.flip.state, time.monotonic()
        while not self.flip.ended:
            event = await self._next()
            commands = self.flip.handle(event, time.monotonic())
            if self.flip.state is not state:
                self.report.phases.add(phase=state, duration_ms=(time.monotonic() - since) * 1e3)
                state, since = self.flip.state, time.monotonic()
                self.report.state = state
                self._write(state)
                if state in DIES:
                    maybe_die(DIES[state], self.state_dir)
            for command in commands:
                self._do(command)
        self.report.message = self.flip.message
        self.report.outcome = OUTCOMES[self.flip.state]
        self.node.touch()
        return self.report.outcome

    def _write(self, state: machine.FlipState) -> None:
        """The first line, which takes the epochs, must be on disk before a group is closed. Later ones must not stop a flip half-way."""
        try:
            self.journal.write(operation_id=self.report.operation_id, flip=str(state), epoch=self.flip.epoch + 2)
        except OSError as e:
            if state is machine.FlipState.CLOSING:
                raise
            log.error("journal of operation %s, %s: %s", self.report.operation_id, state, e)

    def _up(self, engine_id: str) -> bool:
        slot = self.node.slots.get(engine_id)
        return slot is not None and not slot.ended and slot.state in (Report.STATE_PARKED, Report.STATE_AWAKE)

    async def _next(self) -> machine.Event:
        deadline = self.flip.deadline
        while True:
            wait = 0.01 if self.ending else None
            if deadline is not None:
                wait = min(wait or 60.0, max(deadline - time.monotonic(), 0.0))
            try:
                return await asyncio.wait_for(self.events.get(), wait)
            except TimeoutError:
                if self.ending and not any(s.group_id in self.ending and s.on_engine for s in self.node.streams.values()):
                    self.ending = ()
                    return machine.StreamsEnded()
                if deadline is not None and time.monotonic() >= deadline:
                    return machine.DeadlinePassed()

    def engine_ended(self, engine_id: str) -> None:
        """No process of it is left, whoever ended it."""
        self.events.put_nowait(machine.EngineEnded(engine_id))

    def _do(self, command: machine.Command) -> None:
        node = self.node
        match command:
            case machine.CloseGroups(groups, successors, opening, epoch):
                self.touched = True
                for g in opening:
                    make_known(node, g, self.wires[g.group_id], epoch, types_pb2.GROUP_STATE_OPENING)
                close_groups(node, {g.group_id: ids for g, ids in zip(groups, successors, strict=True)})
                node.epoch = epoch
                self.ending = tuple(g.group_id for g in groups)
                self.report.resident_tokens = sum(s.tokens for s in node.streams.values() if s.group_id in self.ending)
                node.touch()
                self.events.put_nowait(machine.GroupsClosed())
            case machine.AbortStreams(groups):
                self.report.streams_moved = sum(s.on_engine for s in node.streams.values() if s.group_id in self.ending)
                if not any([abort_streams(node, g.group_id) for g in groups]):
                    self.ending = ()
                    self.events.put_nowait(machine.StreamsEnded())
            case machine.ParkEngine(engine_id):
                self.ending = ()
                for live in [g for g in node.groups.values() if g.group.engine_id == engine_id]:
                    if live.state == types_pb2.GROUP_STATE_CLOSING:
                        end_streams(node, live.group.group_id)
                self._start(engine_id, wake=False)
            case machine.WakeEngine(engine_id):
                self._start(engine_id, wake=True)
            case machine.KillEngine(engine_id):
                if task := self.work.pop(engine_id, None):
                    task.cancel()
                self.engines.lost(self.node.slots[engine_id], f"it did not {'park' if engine_id in self.parking else 'wake'} in time")
            case machine.OpenGroups(groups, failed, gone, epoch):
                self._open(groups, failed, gone, epoch)
                self.events.put_nowait(machine.GroupsOpened())

    def _open(self, groups: tuple[Group, ...], failed: tuple[Group, ...], gone: tuple[Group, ...], epoch: int) -> None:
        node = self.node
        node.epoch = epoch
        ids = tuple(g.group_id for g in groups)
        for g in (*groups, *failed):
            live = node.groups[g.group_id]
            live.wire.epoch = epoch
            if g in failed:
                live.state = types_pb2.GROUP_STATE_FAILED
        up = [g.group_id for g in groups if self._up(g.engine_id)]
        for group_id in set(ids).difference(up):  # its engine ended a moment ago, and opens it when it is back
            node.groups[group_id].state = types_pb2.GROUP_STATE_FAILED
        open_groups(node, *up)
        for g in gone:
            if g.group_id in node.groups and g.group_id not in ids:
                remove_group(node, g.group_id, node.closed.get(g.group_id) or ids)
        node.touch()

    def _start(self, engine_id: str, wake: bool) -> None:
        (self.parking.discard if wake else self.parking.add)(engine_id)
        self.work[engine_id] = asyncio.create_task(self._turn(engine_id, wake))

    async def _turn(self, engine_id: str, wake: bool) -> None:
        """Where the engine ends instead, or must, the machine hears of it when its processes are gone."""
        slot, awake = self.node.slots[engine_id], self.engines.awake
        try:
            await (awake.wake(slot) if wake else awake.park(slot))
        except EngineEnded as e:
            self.engines.lost(slot, str(e))
        except Exception as e:  # a bug: what is in between cannot be trusted
            log.exception("engine %s in operation %s", engine_id, self.report.operation_id)
            self.engines.lost(slot, f"internal error: {type(e).__name__}: {e}")
        else:
            self.events.put_nowait(machine.EngineWoken(engine_id) if wake else machine.EngineParked(engine_id))

    def _abandon(self) -> None:
        """After a bug half-way nobody knows what is awake: engines are ended, B's groups go, A's wait for theirs to come back."""
        node, closing = self.node, [g.group_id for g in self.flip.closing]
        for task in self.work.values():
            task.cancel()
        for slot in [node.slots[i] for i in self.flip.engines if i in node.slots]:
            self.engines.lost(slot, "ended after an internal error in a flip")
        node.epoch += 2
        for group_id in closing:
            if (live := node.groups.get(group_id)) is not None:
                end_streams(node, group_id)
                live.state, live.wire.epoch = types_pb2.GROUP_STATE_FAILED, node.epoch
        link(node)
        for group_id in {g.group_id for g in self.flip.opening} - set(closing):
            if group_id in node.groups:
                remove_group(node, group_id, tuple(closing))
        node.touch()
