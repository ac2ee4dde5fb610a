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

from nitsum_sglang.checkpoint import read_facts, served_dtype
from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineRequest, EngineSpec
from nitsum_sglang.testing.models import smollm2, tiny_llama
from nitsum_sglang.zygote_client import Zygote

from .conftest import collect, logprobs, submit, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [(7 * i) % 900 + 3 for i in range(96)]
MADE = {"tiny": tiny_llama, "tied-gqa": lambda: tiny_llama(kv_heads=2, tied=True, dtype="bfloat16"), "smollm2": smollm2}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MADE |= {
    "llama3-rope": lambda: tiny_llama(layers=2, kv_heads=2, rope=LLAMA3_ROPE | {"original_max_position_embeddings": 32}),
    "qwen2": lambda: tiny_llama(layers=2, kv_heads=2, family="Qwen2", tied=True),
    "qwen3": lambda: tiny_llama(layers=2, kv_heads=2, family="Qwen3"),
}


@contextlib.asynccontextmanager
async def weight_store(model: str, folder: Path, dtype: str, zygote: Zygote) -> AsyncIterator[tuple[str, dict]]:
    socket, memory = folder / "w.sock", tempfile.mkdtemp(prefix="nitsum-w", dir="/dev/shm")
    flags = ["--model", model, "--socket", str(socket), "--memory-dir", memory, "--dtype", dtype, "--die-with-parent"]
    flags += ["--zygote", zygote.socket_path]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nitsum_sglang.weights.store", *flags, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield str(socket), json.loads(await process.stdout.readline()) | {"memory": Path(memory)}
    finally:
        process.terminate()
        assert await process.wait() == 0
        assert left_behind(memory, socket) == []


def left_behind(memory: str, socket: Path) -> list[str]:
    """What a store leaves, less its lock; the folder goes."""
    left = [p.name for p in [*Path(memory).iterdir(), socket] if p.exists() and p.suffix != ".lock"]
    shutil.rmtree(memory)
    return left


async def scored(
    zygote: Zygote, model: str, folder: Path, tp: int, socket: str, dtype: str = "float32"
) -> tuple[list[float], list[int], list[int], int]:
    """Logprobs of every prompt position and of 8 greedy tokens; the tokens; private kB of weight pages by rank; all that it holds
    for itself, kB."""
    name = f"{'store' if socket else 'stock'}{tp}"
    spec = EngineSpec(name, model, "r0", tp, tuple(f"gpu{i}" for i in range(tp)), str(folder / name), weight_socket=socket, dtype=dtype)
    engine = SchedulerEngine(spec, zygote)
    try:
        info = await engine.start()
        await engine.wake()
        request = submit(PROMPT, 8, ignore_eos=True)
        request.logprobs.start, request.logprobs.top = 0, 1
        deltas = (await collect(engine, [EngineRequest("a.", request)]))["a."]
        values = [v for d in deltas for v in d.input_logprobs.values][1:] + logprobs(deltas)
        return values, tokens(deltas), [kilobytes(pid) for pid in info.pids if weight_mappings(pid)], sum(map(own, info.pids))
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


def own(pid: int) -> int:
    """Memory of this process that is of no file, kB: a page of the store that it alone maps would count as private."""
    return sum(map(int, re.findall(r"(?m)^Anonymous:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())))


def pss(pid: int) -> int:
    """Its part of the store's file, kB."""
    return sum(int(v) for a in weight_mappings(pid) for v in re.findall(r"Pss:\s+(\d+)", a))


# On CPU SGLang pads KV heads where there are fewer than ranks, and then cannot load the checkpoint: replication is a unit test of the plan.
@pytest.mark.parametrize(
    ("which", "degrees", "dtype"),
    [
        ("tiny", (1, 2, 4), "float32"),
        ("tied-gqa", (1, 2), "float32"),
        ("tied-gqa", (1, 2), ""),
        ("smollm2", (1, 3), ""),
        ("llama3-rope", (2,), ""),
        ("qwen2", (2,), ""),
        ("qwen3", (2,), ""),
    ],
)
async def test_store_equals_stock_load(zygote, tmp_path, which, degrees, dtype) -> None:
    """`dtype` empty: as the checkpoint says, bfloat16 for tied-gqa, float32 for smollm2."""
    model = str(MADE[which]())
    served, facts = served_dtype(model, dtype), read_facts(model, "m", dtype)
    size, cos_sin = facts.weight_bytes, 4 * facts.context_length * facts.head_dim
    tmp_path.chmod(0o700)
    async with weight_store(model, tmp_path, dtype, zygote) as (socket, ready):
        assert size <= ready["bytes"] <= 1.01 * size + cos_sin, "one copy, the cos/sin cache, ends of pages"
        for tp in degrees:
            # Slices of biases are no whole pages: every rank copies its own, here a few hundred bytes a layer.
            assert ready["private_bytes"][str(tp)] == (2 * (128 + 32 + 32) * 4 if which == "qwen2" else 0)
            want, want_tokens, _, want_own = await scored(zygote, model, tmp_path, tp, "", dtype)
            got, got_tokens, private, got_own = await scored(zygote, model, tmp_path, tp, socket, dtype)
            assert len(got) == len(want) == len(PROMPT) - 1 + 8
            assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < (1e-4 if served == "float32" else 0.05)
            assert got_tokens == want_tokens
            assert private == [0] * tp
            if size > 100 << 20:  # else it drowns in what SGLang itself allocates, which differs by a tenth of this from start to start
                assert (want_own - got_own) << 10 > 0.75 * size, "a copy in the heap, of one rank at least"


async def test_with_or_without_a_zygote_the_store_is_the_same(zygote, tmp_path) -> None:
    """One that is named and not there, as after its end: the store imports SGLang itself."""
    tmp_path.chmod(0o700)
    gone = Zygote(tmp_path / "gone.sock", tmp_path / "gone.log")
    files = []
    for maker in (zygote, gone):
        async with weight_store(str(MADE["llama3-rope"]()), tmp_path, "float32", maker) as (_, ready):
            (file,) = ready["memory"].glob("*.weights")
            files.append(file.read_bytes())
    assert files[0] == files[1]
