"""Resident engines: start, warm up, read, start again when they end. When one may be awake is `awake.py`'s business."""

import asyncio
import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host import streams
from nitsum_host.awake import Awake
from nitsum_host.groups import on_engine_ended, open_groups
from nitsum_host.node import Node, Slot
from nitsum_host.stores import Stores
from nitsum_sglang.port import Engine, EngineEnded, EngineSpec

log = logging.getLogger(__name__)
Report = agent_pb2.EngineReport
RESTARTS_MAX = 5
"""In a row: past this many the report calls it a problem. Tries go on, as seldom as the last pause says."""
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
STEADY_S = 300.0
"""Up for this long: a later end is not the same trouble."""
WAKE_S = 60.0
END_S = 30.0
"""From SIGKILL to the last process gone; past it the report calls it a problem."""
END_AGAIN_S = 5.0
STARTS_AT_ONCE = 4
"""Engines of one directive: loading and warming up each keep a core or two busy."""
FOLDER_MAX = 40
"""Characters of an engine's folder: it holds Unix sockets, whose names are short."""


async def _nothing() -> None:
    return


@dataclass(frozen=True)
class Settings:
    state_dir: Path
    memory_dir: Path
    max_total_tokens: int = 8192
    seed_exact: bool = False
    weight_store: bool = True
    device: str = "cpu"
    dtype: str = ""
    """Of weights and KV; empty: as each checkpoint says."""
    zygote: str = ""
    """Socket of the zygote, for what else needs SGLang."""
    make: Callable[[EngineSpec], Engine] = field(kw_only=True)
    prepare: Callable[[], Awaitable[None]] = field(default=_nothing, kw_only=True)
    """Awaited before each start of an engine, e.g. to start the zygote again. Raises EngineEnded."""
    backoff_s: tuple[float, ...] = field(default=BACKOFF_S, kw_only=True)


class Engines:
    """`on_ended` is told of every engine that ended, unasked or not in time for a flip, when no process of it is left."""

    def __init__(self, node: Node, settings: Settings, on_ended: Callable[[str], None]) -> None:
        self.node, self.settings, self.on_ended = node, settings, on_ended
        self.awake = Awake(node)
        self.stores = Stores(settings.state_dir, settings.memory_dir, settings.dtype, settings.zygote if settings.device == "cpu" else "")
        self.tasks: set[asyncio.Task[None]] = set()
        self.revisions: dict[str, str] = {}
        self.stopping = False

    @property
    def problem(self) -> str:
        """Of engines that do not stay up."""
        down = [
            f"engine {i} does not stay up ({s.failures} starts in a row): {s.message}"
            for i, s in self.node.slots.items()
            if s.failures >= RESTARTS_MAX and s.state not in (Report.STATE_PARKED, Report.STATE_AWAKE)
        ]
        down += [f"engine {i}: {s.message}" for i, s in self.node.slots.items() if s.stuck]
        return "; ".join(down)[:2000]

    def stale(self, wires: Iterable[types_pb2.ResidentEngine], paths: dict[str, str]) -> frozenset[str]:
        """Engines whose id now stands for another model, checkpoint or set of GPUs."""
        found = set()
        for wire in wires:
            slot = self.node.slots.get(wire.engine_id)
            path = paths[wire.model]
            if slot is not None and (_of(slot.wire) != _of(wire) or _from(slot.engine.spec) != (path, self.revisions.get(path, ""))):
                found.add(wire.engine_id)
        return frozenset(found)

    async def ensure_all(self, wires: Iterable[types_pb2.ResidentEngine], paths: dict[str, str]) -> None:
        """In this order, some at a time; their warm-ups take turns on GPUs. Raises the first failure when all have ended their tries."""
        free = asyncio.Semaphore(STARTS_AT_ONCE)

        async def one(wire: types_pb2.ResidentEngine) -> None:
            async with free:
                await self.ensure(wire, paths[wire.model])

        for result in await asyncio.gather(*(one(wire) for wire in wires), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def ensure(self, wire: types_pb2.ResidentEngine, model_path: str) -> None:
        """Starts and warms one engine unless it is there. Raises what kept it from coming up; then it is not there."""
        if (known := self.node.slots.get(wire.engine_id)) is not None:
            known.hurry.set()  # one that is down is tried now
            return
        slot = self.node.slots[wire.engine_id] = Slot(await self._make(wire, model_path), wire)
        try:
            await self._bring_up(slot)
        except BaseException:
            await self._drop(slot)
            raise

    async def _make(self, wire: types_pb2.ResidentEngine, model_path: str) -> Engine:
        """With a zygote and a weight store that are there."""
        await self.settings.prepare()
        settings = self.settings
        spec = EngineSpec(
            wire.engine_id,
            model_path,
            self.revisions.get(model_path, ""),
            wire.tp_size,
            tuple(wire.gpu_uuids),
            str(settings.state_dir / "e" / folder_name(wire.engine_id)),
            device=settings.device,
            max_total_tokens=settings.max_total_tokens,
            dtype=settings.dtype,
            weight_socket=await self.stores.socket(model_path) if settings.weight_store else "",
            kv_dir=self._kv_dir(),
            seed_exact=settings.seed_exact,
        )
        Path(spec.state_dir).mkdir(parents=True, exist_ok=True, mode=0o700)  # noqa: ASYNC240
        return settings.make(spec)

    async def _bring_up(self, slot: Slot) -> None:
        """Start, warm-up, and where a group waits for this very engine, service: the GPUs are its own from warm-up to wake."""
        engine_id = slot.wire.engine_id
        slot.state, slot.ended = Report.STATE_STARTING, False
        self.node.touch()
        slot.info = await slot.engine.start()
        async with self.awake.turn(f"the warm-up of {engine_id}", slot.wire.gpu_uuids):
            if self.awake.free(slot):
                await self.awake.warm_up(slot)
                slot.message = ""
            else:
                slot.state, slot.message = Report.STATE_PARKED, "not warmed up: its GPUs are in use"
            self._keep(self._read(slot, slot.engine))
            # Looked up now, not when the engine ended: a flip may have closed its group since.
            waiting = [g for g in self.node.groups.values() if g.group.engine_id == engine_id and g.state == types_pb2.GROUP_STATE_FAILED]
            if waiting:
                async with asyncio.timeout(WAKE_S):
                    await self.awake.wake(slot)
                for live in waiting:
                    log.info("group %s serves again", live.group.group_id)
                    open_groups(self.node, live.group.group_id)
        slot.up_since = time.monotonic()
        self.node.touch()

    def _keep(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _read(self, slot: Slot, engine: Engine) -> None:
        try:
            async for deltas in engine.steps():
                streams.on_step(self.node, deltas)
            return  # ended on purpose, by someone who says so
        except EngineEnded as e:
            why = str(e)
        except Exception as e:  # a bug: its streams must not hang on an engine that nobody reads
            log.exception("reading engine %s", slot.wire.engine_id)
            why = f"internal error: {type(e).__name__}: {e}"
        if slot.engine is engine:
            self.lost(slot, why)

    def lost(self, slot: Slot, why: str) -> None:
        """Its engine is over, or must be: streams are told at once, then what is left of it is ended, then it is started anew."""
        engine_id = slot.wire.engine_id
        if self.stopping or slot.leaving or self.node.slots.get(engine_id) is not slot:
            return
        if slot.revival is not None and not slot.revival.done():
            slot.ended = True
            return
        log.warning("engine %s ended: %s", engine_id, why[:300])
        if time.monotonic() - slot.up_since > STEADY_S:
            slot.failures = 0
        slot.ended = True
        on_engine_ended(self.node, engine_id, why)
        slot.revival = self._keep(self._revive(slot))

    async def _revive(self, slot: Slot) -> None:
        """Until it is up. A group that it serves opens again."""
        engine_id = slot.wire.engine_id
        await self._end(slot)
        self.on_ended(engine_id)
        while True:
            slot.hurry.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(slot.hurry.wait(), self.settings.backoff_s[min(slot.failures, len(self.settings.backoff_s) - 1)])
            slot.restarts, slot.failures = slot.restarts + 1, slot.failures + 1
            try:
                slot.engine = await self._make(slot.wire, slot.engine.spec.model_path)
                await self._bring_up(slot)
            except Exception as e:
                expected = isinstance(e, EngineEnded | OSError | TimeoutError)
                slot.message = (str(e) or type(e).__name__)[:500]
                log.warning("engine %s, start %d in a row: %s", engine_id, slot.failures, slot.message, exc_info=not expected)
                await self._end(slot)
                self.node.touch()
            else:
                log.info("engine %s is back after %d starts", engine_id, slot.failures)
                return

    async def _end(self, slot: Slot) -> None:
        """Nothing new is started on its GPUs while something of it may be left."""
        while True:
            try:
                async with asyncio.timeout(END_S):
                    await self.awake.end(slot)
                slot.stuck = False
                return
            except Exception as e:
                slot.stuck = True
                slot.message = f"its processes do not end ({type(e).__name__}: {e}); its GPUs wait for them"[:500]
                log.exception("engine %s: %s", slot.wire.engine_id, slot.message)
                self.node.touch()
                await asyncio.sleep(END_AGAIN_S)

    async def remove(self, engine_id: str) -> None:
        slot = self.node.slots[engine_id]
        used = [i for i, g in self.node.groups.items() if g.group.engine_id == engine_id]
        assert not used, f"engine {engine_id} is to go while groups {used} are on it"
        await self._drop(slot)

    async def _drop(self, slot: Slot) -> None:
        slot.leaving = True
        if slot.revival is not None:
            slot.revival.cancel()
            await asyncio.gather(slot.revival, return_exceptions=True)
        await self._end(slot)
        del self.node.slots[slot.wire.engine_id]
        self.node.touch()

    async def forget_unused(self) -> None:
        """Weights that no engine runs any more leave memory."""
        used = {s.engine.spec.model_path for s in self.node.slots.values()}
        self.revisions = {path: r for path, r in self.revisions.items() if path in used}
        await self.stores.keep(used)

    def _kv_dir(self) -> str:
        if not self.settings.weight_store:
            return ""
        folder = self.settings.memory_dir / "kv"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return str(folder)

    async def stop(self) -> None:
        """First whatever could start an engine, then the engines, then what they stood on."""
        self.stopping = True
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(s.engine.stop() for s in self.node.slots.values()), return_exceptions=True)
        await self.stores.keep(set())
        shutil.rmtree(self.settings.memory_dir, ignore_errors=True)


def _of(wire: types_pb2.ResidentEngine) -> tuple[str, int, list[str]]:
    return wire.model, wire.tp_size, list(wire.gpu_uuids)


def _from(spec: EngineSpec) -> tuple[str, str]:
    return spec.model_path, spec.revision


def folder_name(engine_id: str) -> str:
    """One folder, one engine: a long id keeps its end and gets a digest, so that two of them never meet."""
    if len(engine_id) <= FOLDER_MAX and "/" not in engine_id:
        return engine_id
    digest = hashlib.sha256(engine_id.encode()).hexdigest()[:8]
    return f"{digest}-{engine_id.replace('/', '_')[9 - FOLDER_MAX :]}"
