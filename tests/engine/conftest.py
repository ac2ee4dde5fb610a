"""Real engines for the tests of this folder: one zygote for the session, the tiny model, engines started once per TP."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineRequest, EngineSpec
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.zygote_client import Zygote, log_tail

Deltas = dict[str, list[node_pb2.TokenDelta]]
Until = Callable[[Deltas], bool]
StartEngine = Callable[..., Awaitable[SchedulerEngine]]


@pytest.fixture(scope="session")
def model_path() -> str:
    return str(tiny_llama())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygote() -> AsyncIterator[Zygote]:
    with tempfile.TemporaryDirectory(prefix="nitsum-z") as folder:
        z = Zygote(Path(folder, "z.sock"), Path(folder, "zygote.log"))
        await z.start()
        assert z.forks, log_tail(z.log_path)
        yield z
        await z.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_engine(zygote: Zygote, model_path: str) -> AsyncIterator[StartEngine]:
    """Starts an engine of the tiny model; all of them are stopped at the module's end."""
    engines: list[SchedulerEngine] = []
    with tempfile.TemporaryDirectory(prefix="nitsum-e") as folder:

        async def start(tp: int, **fields: object) -> SchedulerEngine:
            name = f"e{len(engines)}"
            settings = {"revision": "r0", "tp_size": tp, "gpu_uuids": tuple(f"gpu{i}" for i in range(tp))} | fields
            limit = {k: settings.pop(k) for k in ("kv_max_bytes",) if k in settings}
            spec = EngineSpec(name, model_path, state_dir=str(Path(folder, name)), **settings)  # type: ignore[arg-type]
            engines.append(SchedulerEngine(spec, zygote, **limit))  # type: ignore[arg-type]
            await engines[-1].start()
            return engines[-1]

        yield start
        await asyncio.gather(*(e.stop() for e in engines))


def submit(prompt: list[int], max_new_tokens: int = 12, **sampling: object) -> node_pb2.Submit:
    """A greedy request."""
    fields = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "top_k": 1, "skip_special_tokens": True} | sampling
    return node_pb2.Submit(input_ids=prompt, sampling=node_pb2.Sampling(**fields))  # type: ignore[arg-type]


async def collect(engine: SchedulerEngine, requests: list[EngineRequest], until: Until | None = None) -> Deltas:
    """Submits, and reads until all have finished or `until` says so: deltas by rid."""
    got: dict[str, list[node_pb2.TokenDelta]] = {r.rid: [] for r in requests}
    for r in requests:
        engine.submit(r)
    steps = engine.steps()
    async with asyncio.timeout(60):
        async for step in steps:
            for delta in step:
                if delta.request_id in got:
                    got[delta.request_id].append(delta)
            if all(d and d[-1].HasField("finish") for d in got.values()) or (until is not None and until(got)):
                break
    await steps.aclose()
    return got


def tokens(deltas: list[node_pb2.TokenDelta]) -> list[int]:
    return [t for d in deltas for t in d.token_ids]


def logprobs(deltas: list[node_pb2.TokenDelta]) -> list[float]:
    return [v for d in deltas for v in d.output_logprobs.values]
