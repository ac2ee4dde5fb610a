"""Carries a flip out: the machine's commands become work on engines and groups, their ends become its events.

It runs to its end in the host, whether the agent is there or not.
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
from nitsum_host.journal import Journal
from nitsum_host.node import Node
from nitsum_sglang.port import EngineEnded

log = logging.getLogger(__name__)
Outcome = agent_pb2.FlipReport.Outcome
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
        node: Node,
        journal: Journal,
        state_dir: Path,
        operation_id: str,
        after: Layout,
        wires: dict[str, types_pb2.Group],
        mode: FlipMode,
        deadlines: machine.Deadlines,
    ) -> None:
        self.node, self.journal, self.state_dir, self.wires = node, journal, state_dir, wires
        self.flip = machine.Flip(node.layout, after, mode, node.epoch, deadlines)
        self.report = agent_pb2.FlipReport(operation_id=operation_id, outcome=Outcome.OUTCOME_RUNNING)
        self.events: asyncio.Queue[machine.Event] = asyncio.Queue()
        self.work: dict[str, asyncio.Task[None]] = {}
        self.ending: tuple[str, ...] = ()

    async def run(self) -> "Outcome.ValueType":
        dead = frozenset(i for i in self.flip.engines if i not in self.node.slots or self._failed(i))
        self.events.put_nowait(machine.FlipRequested(dead))
        state, since = self.flip.state, time.monotonic()
        while not self.flip.ended:
            event = await self._next()
            commands = self.flip.handle(event, time.monotonic())
            if self.flip.state is not state:
                self.report.phases.add(phase=state, duration_ms=(time.monotonic() - since) * 1e3)
                state, since = self.flip.state, time.monotonic()
                self.report.state = state
                self.journal.write(operation_id=self.report.operation_id, flip=str(state), epoch=self.flip.epoch + 2)
                if state in DIES:
                    maybe_die(DIES[state], self.state_dir)
            for command in commands:
                self._do(command)
        self.report.message = self.flip.message
        self.report.outcome = OUTCOMES[self.flip.state]
        self.node.touch()
        return self.report.outcome

    def _failed(self, engine_id: str) -> bool:
        return self.node.slots[engine_id].state == agent_pb2.EngineReport.STATE_FAILED

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
        """The host saw it end, asked or not."""
        self.events.put_nowait(machine.EngineEnded(engine_id))

    def _do(self, command: machine.Command) -> None:
        node = self.node
        match command:
            case machine.CloseGroups(groups, successors, opening, epoch):
                for g in opening:
                    node.known(g, self.wires[g.group_id], epoch, types_pb2.GROUP_STATE_OPENING)
                for g, ids in zip(groups, successors, strict=True):
                    node.close(g.group_id, ids)
                node.epoch = epoch
                self.ending = tuple(g.group_id for g in groups)
                self.report.resident_tokens = sum(s.tokens for s in node.streams.values() if s.group_id in self.ending)
                node.touch()
                self.events.put_nowait(machine.GroupsClosed())
            case machine.AbortStreams(groups):
                self.report.streams_moved = sum(s.on_engine for s in node.streams.values() if s.group_id in self.ending)
                if not any([node.abort_streams(g.group_id) for g in groups]):
                    self.ending = ()
                    self.events.put_nowait(machine.StreamsEnded())
            case machine.ParkEngine(engine_id):
                self.ending = ()
                for live in [g for g in node.groups.values() if g.group.engine_id == engine_id]:
                    if live.state == types_pb2.GROUP_STATE_CLOSING:
                        node.end_streams(live.group.group_id)
                self._start(engine_id, wake=False)
            case machine.WakeEngine(engine_id):
                self._start(engine_id, wake=True)
            case machine.KillEngine(engine_id):
                if task := self.work.pop(engine_id, None):
                    task.cancel()
                self.work[engine_id] = asyncio.create_task(self._kill(engine_id))
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
        for g in groups:
            node.open(g.group_id)
        for g in gone:
            if g.group_id in node.groups and g.group_id not in ids:
                node.remove(g.group_id, node.closed.get(g.group_id) or ids)
        node.touch()

    def _start(self, engine_id: str, wake: bool) -> None:
        self.work[engine_id] = asyncio.create_task(self._turn(engine_id, wake))

    async def _turn(self, engine_id: str, wake: bool) -> None:
        slot = self.node.slots[engine_id]
        try:
            await (slot.engine.wake() if wake else slot.engine.park())
        except EngineEnded:
            self.engine_ended(engine_id)
            return
        slot.state = agent_pb2.EngineReport.STATE_AWAKE if wake else agent_pb2.EngineReport.STATE_PARKED
        self.events.put_nowait(machine.EngineWoken(engine_id) if wake else machine.EngineParked(engine_id))

    async def _kill(self, engine_id: str) -> None:
        await self.node.slots[engine_id].engine.stop()
        self.engine_ended(engine_id)
