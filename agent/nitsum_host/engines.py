"""Resident engines: start, warm up, read, restart when they crash. Only one is ever awake on a GPU, warm-ups included."""

import asyncio
import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host.node import Node, Slot
from nitsum_sglang.port import Engine, EngineEnded, EngineSpec
from nitsum_sglang.warmup import warm_up

log = logging.getLogger(__name__)
Report = agent_pb2.EngineReport
RESTARTS_MAX = 5
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
STORE_START_S = 300.0


@dataclass
class Store:
    """The weight store's process of one model."""

    process: asyncio.subprocess.Process
    socket: str


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
    make: Callable[[EngineSpec], Engine] = field(kw_only=True)


class Engines:
    """`on_ended` is told of every engine that ended unasked."""

    def __init__(self, node: Node, settings: Settings, on_ended: Callable[[str], None]) -> None:
        self.node, self.settings, self.on_ended = node, settings, on_ended
        self.stores: dict[str, Store] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.revisions: dict[str, str] = {}
        self.stopping = False

    async def ensure(self, wire: types_pb2.ResidentEngine, model_path: str) -> None:
        """Starts and warms one engine unless it is there. Raises EngineEnded with the log's tail."""
        if wire.engine_id in self.node.slots:
            return
        spec = EngineSpec(
            wire.engine_id,
            model_path,
            self.revisions.get(model_path, ""),
            wire.tp_size,
            tuple(wire.gpu_uuids),
            str(self.settings.state_dir / "e" / wire.engine_id[-40:]),
            device=self.settings.device,
            max_total_tokens=self.settings.max_total_tokens,
            dtype=self.settings.dtype,
            weight_socket=await self._store(model_path),
            kv_dir=self._kv_dir(model_path),
            seed_exact=self.settings.seed_exact,
        )
        Path(spec.state_dir).mkdir(parents=True, exist_ok=True, mode=0o700)  # noqa: ASYNC240
        slot = self.node.slots[wire.engine_id] = Slot(self.settings.make(spec), wire)
        try:
            await self._bring_up(slot)
        except EngineEnded:
            self.node.slots.pop(wire.engine_id, None)
            raise

    async def _bring_up(self, slot: Slot) -> None:
        slot.state = Report.STATE_STARTING
        self.node.touch()
        slot.info = await slot.engine.start()
        others = {
            u
            for s in self.node.slots.values()
            if s is not slot and s.state in (Report.STATE_AWAKE, Report.STATE_WARMING)
            for u in s.wire.gpu_uuids
        }
        if others & set(slot.wire.gpu_uuids):
            slot.message = "not warmed up: its GPUs are in use"
        else:
            slot.state = Report.STATE_WARMING
            self.node.touch()
            await warm_up(slot.engine)
        slot.state = Report.STATE_PARKED
        slot.reader = asyncio.create_task(self._read(slot))
        self.tasks.add(slot.reader)
        slot.reader.add_done_callback(self.tasks.discard)
        self.node.touch()

    async def _read(self, slot: Slot) -> None:
        engine_id = slot.wire.engine_id
        try:
            async for deltas in slot.engine.steps():
                self.node.on_step(deltas)
        except EngineEnded as e:
            if self.stopping or self.node.slots.get(engine_id) is not slot:
                return
            log.warning("engine %s ended: %s", engine_id, str(e)[:300])
            self.node.on_engine_ended(engine_id, str(e))
            self.on_ended(engine_id)
            task = asyncio.create_task(self._revive(slot))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _revive(self, slot: Slot) -> None:
        """Bounded restarts; a group that this engine serves opens again."""
        while slot.restarts < RESTARTS_MAX and not self.stopping:
            await asyncio.sleep(BACKOFF_S[min(slot.restarts, len(BACKOFF_S) - 1)])
            slot.restarts += 1
            with contextlib.suppress(EngineEnded):
                await slot.engine.stop()
                slot.engine = self.settings.make(slot.engine.spec)
                await self._bring_up(slot)
                serves = [
                    g
                    for g in self.node.groups.values()
                    if g.group.engine_id == slot.wire.engine_id and g.state == types_pb2.GROUP_STATE_FAILED
                ]
                if serves:
                    await slot.engine.wake()
                    slot.state = Report.STATE_AWAKE
                    for live in serves:
                        self.node.open(live.group.group_id)
                    self.node.touch()
                return
        slot.message = f"given up after {slot.restarts} restarts: {slot.message}"

    async def remove(self, engine_id: str) -> None:
        slot = self.node.slots.pop(engine_id)
        await slot.engine.stop()
        self.node.touch()

    def _kv_dir(self, model_path: str) -> str:
        if not self.settings.weight_store:
            return ""
        folder = self.settings.memory_dir / "kv"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return str(folder)

    async def _store(self, model_path: str) -> str:
        """Socket of the model's weight store, started if it is not running; empty where stores are off."""
        if not self.settings.weight_store:
            return ""
        store = self.stores.get(model_path)
        if store is not None and store.process.returncode is None:
            return store.socket
        folder = self.settings.memory_dir / "weights"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        socket = str(self.settings.state_dir / f"w{len(self.stores)}.sock")
        flags = ["--model", model_path, "--socket", socket, "--memory-dir", str(folder), "--die-with-parent"]
        flags += ["--dtype", self.settings.dtype]
        with (self.settings.state_dir / "weights.log").open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nitsum_sglang.weights.store", *flags, stdout=asyncio.subprocess.PIPE, stderr=out
            )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), STORE_START_S)
        if not line:
            raise EngineEnded(f"the weight store of {model_path} did not start; see {self.settings.state_dir / 'weights.log'}")
        log.info("weight store of %s: %s", model_path, json.loads(line))
        self.stores[model_path] = Store(process, socket)
        return socket

    async def stop(self) -> None:
        self.stopping = True
        await asyncio.gather(*(s.engine.stop() for s in self.node.slots.values()), return_exceptions=True)
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for store in self.stores.values():
            if store.process.returncode is None:
                store.process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(store.process.wait(), 5)
        shutil.rmtree(self.settings.memory_dir, ignore_errors=True)
