"""Engines on the weight store compute what engines that load the checkpoint themselves compute, and hold no weights of their own."""

import asyncio
import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineRequest, EngineSpec
from nitsum_sglang.testing.models import smollm2, tiny_llama
from nitsum_sglang.zygote_client import Zygote

from .conftest import collect, logprobs, submit, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [(7 * i) % 900 + 3 for i in range(96)]


@contextlib.asynccontextmanager
async def weight_store(model: str, folder: Path) -> AsyncIterator[tuple[str, dict]]:
    socket, memory = folder / "w.sock", tempfile.mkdtemp(prefix="nitsum-w", dir="/dev/shm")
    flags = ["--model", model, "--socket", str(socket), "--memory-dir", memory, "--dtype", "float32", "--die-with-parent"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nitsum_sglang.weights.store", *flags, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield str(socket), json.loads(await process.stdout.readline())
    finally:
        process.terminate()
        assert await process.wait() == 0
        assert left_behind(memory, socket) == []


def left_behind(memory: str, socket: Path) -> list[str]:
    """What a store leaves, less its lock; the folder goes."""
    left = [p.name for p in [*Path(memory).iterdir(), socket] if p.exists() and p.suffix != ".lock"]
    shutil.rmtree(memory)
    return left


async def scored(zygote: Zygote, model: str, folder: Path, tp: int, socket: str) -> tuple[list[float], list[int], list[int]]:
    """Logprobs of every prompt position and of 8 greedy tokens; the tokens; private kB of weight pages by rank."""
    name = f"{'store' if socket else 'stock'}{tp}"
    spec = EngineSpec(name, model, "r0", tp, tuple(f"gpu{i}" for i in range(tp)), str(folder / name), weight_socket=socket)
    engine = SchedulerEngine(spec, zygote)
    try:
        info = await engine.start()
        await engine.wake()
        request = submit(PROMPT, 8, ignore_eos=True)
        request.logprobs.start, request.logprobs.top = 0, 1
        deltas = (await collect(engine, [EngineRequest("a.", request)]))["a."]
        values = [v for d in deltas for v in d.input_logprobs.values][1:] + logprobs(deltas)
        return values, tokens(deltas), [kilobytes(pid) for pid in info.pids if weight_mappings(pid)]
    finally:
        await engine.stop()


def weight_mappings(pid: int) -> list[str]:
    """smaps of the store's file in a process."""
    areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text())
    return [a for a in areas if ".weights" in a.partition("\n")[0]]


def kilobytes(pid: int) -> int:
    """Copies that this process made of the weights' pages. (A shared page that one process alone maps counts as `Private` in smaps, hence
    `Anonymous`.) The mappings are shared and read-only, so there is no way to have any."""
    areas = weight_mappings(pid)
    assert all(a.split()[1] == "r--s" for a in areas)
    return sum(int(v) for a in areas for v in re.findall(r"Anonymous:\s+(\d+)", a))


# On CPU SGLang pads KV heads where there are fewer than ranks, and then cannot load the checkpoint: replication is a unit test of the plan.
@pytest.mark.parametrize(("which", "degrees"), [("tiny", (1, 2, 4)), ("tied-gqa", (1, 2)), ("smollm2", (1, 3))])
async def test_store_equals_stock_load(zygote, tmp_path, which, degrees) -> None:
    made = {"tiny": tiny_llama, "tied-gqa": lambda: tiny_llama(kv_heads=2, tied=True, dtype="bfloat16"), "smollm2": smollm2}
    model = str(made[which]())
    tmp_path.chmod(0o700)
    async with weight_store(model, tmp_path) as (socket, ready):
        for tp in degrees:
            assert ready["private_bytes"][str(tp)] == 0
            want, want_tokens, _ = await scored(zygote, model, tmp_path, tp, "")
            got, got_tokens, private = await scored(zygote, model, tmp_path, tp, socket)
            assert len(got) == len(want) == len(PROMPT) - 1 + 8
            assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-4
            assert got_tokens == want_tokens
            assert private == [0] * tp
