"""Who may be awake on which GPU. Nothing else in the host wakes, parks or ends an engine.

Flips, warm-ups and engines that come back after a crash take turns on their GPUs: whoever has the turn looks again at what is there,
then changes it. An engine counts as awake from before it is told to wake until it has said that it is parked, or its processes are gone.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from nitsum_api.agent.v1 import agent_pb2
from nitsum_host.leftovers import close_interval
from nitsum_host.node import Node, Slot
from nitsum_sglang.port import EngineEnded
from nitsum_sglang.warmup import TIMEOUT_S, warm_up

Report = agent_pb2.EngineReport
WARM_UP_S = TIMEOUT_S + 60.0
"""Its work is bounded by TIMEOUT_S; waking, emptying the cache and parking come on top."""


@dataclass(eq=False)
class Turn:
    what: str
    gpus: frozenset[str]
    held: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Awake:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.turns: list[Turn] = []
        """In the order of asking: each waits for those before it that want one of its GPUs."""

    @contextlib.asynccontextmanager
    async def turn(self, what: str, gpus: Iterable[str], wait_s: float | None = None) -> AsyncIterator[None]:
        """Raises TimeoutError, which names who has the GPUs, after `wait_s`."""
        mine = Turn(what, frozenset(gpus))
        before = [t for t in self.turns if t.gpus & mine.gpus]
        self.turns.append(mine)
        try:
            try:
                async with asyncio.timeout(wait_s):
                    for other in before:
                        await other.over.wait()
            except TimeoutError:
                busy = ", ".join(t.what for t in before if not t.over.is_set())
                raise TimeoutError(f"{what} waited {wait_s:g} s for its GPUs, which are in use by {busy}") from None
            mine.held = True
            yield
        finally:
            self.turns.remove(mine)
            mine.over.set()

    def free(self, slot: Slot) -> bool:
        """Nothing else is awake, or may be, on its GPUs."""
        return not self._rivals(slot)

    def _rivals(self, slot: Slot) -> list[str]:
        gpus = set(slot.wire.gpu_uuids)
        return [i for i, s in self.node.slots.items() if s is not slot and s.awake and gpus & set(s.wire.gpu_uuids)]

    def _claim(self, slot: Slot) -> None:
        rivals, gpus = self._rivals(slot), set(slot.wire.gpu_uuids)
        assert not rivals, f"{slot.wire.engine_id} is to wake while {', '.join(rivals)} may be awake on its GPUs"
        assert any(t.held and gpus <= t.gpus for t in self.turns), f"{slot.wire.engine_id} is to wake out of turn"
        slot.awake = True

    async def wake(self, slot: Slot) -> None:
        """In a turn. Raises EngineEnded; the engine counts as awake until `end` has returned."""
        self._claim(slot)
        self.govern(slot)  # first: no step is without its limits
        await slot.engine.wake()
        if slot.ended:  # between its word and now
            raise EngineEnded(slot.message)
        slot.state = Report.STATE_AWAKE

    def govern(self, slot: Slot) -> None:
        """Carries the limits of its group to an engine that is awake; any other gets them as it wakes."""
        if slot.awake:
            slot.engine.govern(self.node.limits(slot.wire.engine_id))

    async def park(self, slot: Slot) -> None:
        """Raises EngineEnded."""
        await slot.engine.park()
        if slot.ended:
            raise EngineEnded(slot.message)
        slot.awake, slot.state = False, Report.STATE_PARKED

    async def warm_up(self, slot: Slot) -> None:
        """In a turn. Raises EngineEnded, TimeoutError."""
        self._claim(slot)
        slot.state = Report.STATE_WARMING
        self.node.touch()
        async with asyncio.timeout(WARM_UP_S):
            await warm_up(slot.engine)
        slot.awake, slot.state = False, Report.STATE_PARKED

    async def end(self, slot: Slot) -> None:
        """Returns when no process of the engine is left."""
        engine, slot.ended, slot.state = slot.engine, True, Report.STATE_FAILED
        await engine.stop()
        if slot.engine is engine:
            slot.awake = False
            close_interval(engine.spec.state_dir)
