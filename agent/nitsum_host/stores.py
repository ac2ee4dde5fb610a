"""Weight stores: one process for each model path that engines of this node run. One that died is started again with the next engine."""

import asyncio
import contextlib
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from nitsum_sglang.port import EngineEnded

log = logging.getLogger(__name__)
START_S = 300.0
STOP_S = 5.0


@dataclass
class Store:
    process: asyncio.subprocess.Process
    socket: str


class Stores:
    def __init__(self, state_dir: Path, memory_dir: Path, dtype: str = "", zygote: str = "") -> None:
        """`zygote`: socket of one for CPU; without it every store imports SGLang for the rotary embedding."""
        self.state_dir, self.folder, self.dtype, self.zygote = state_dir, memory_dir / "weights", dtype, zygote
        self.stores: dict[str, Store] = {}
        self._turn = asyncio.Lock()
        self._started = 0

    async def socket(self, model_path: str) -> str:
        """Of the model's store, started if it is not running. Raises EngineEnded, OSError."""
        async with self._turn:
            store = self.stores.get(model_path)
            if store is not None and store.process.returncode is None:
                return store.socket
            if store is not None:
                log.warning("weight store of %s ended with %s and is started again", model_path, store.process.returncode)
            store = self.stores[model_path] = await self._start(model_path)
            return store.socket

    async def _start(self, model_path: str) -> Store:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        socket, self._started = str(self.state_dir / f"w{self._started}.sock"), self._started + 1
        flags = ["--model", model_path, "--socket", socket, "--memory-dir", str(self.folder), "--die-with-parent"]
        flags += ["--dtype", self.dtype, "--zygote", self.zygote]
        with (self.state_dir / "weights.log").open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nitsum_sglang.weights.store", *flags, stdout=asyncio.subprocess.PIPE, stderr=out
            )
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except BaseException:
            await _end(process)
            raise
        if not line:
            await _end(process)
            raise EngineEnded(f"the weight store of {model_path} did not start; see {self.state_dir / 'weights.log'}")
        log.info("weight store of %s: %s", model_path, json.loads(line))
        return Store(process, socket)

    async def keep(self, model_paths: set[str]) -> None:
        """Ends the others: no engine runs their model any more, and their weights hold memory."""
        async with self._turn:
            for path in self.stores.keys() - model_paths:
                log.info("weight store of %s is not needed any more", path)
                await _end(self.stores.pop(path).process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
