"""The engine port's contract, on real engines (tiny model, TP 1 and TP 2) and on the fake that the host's own tests use."""

import asyncio
import importlib
import itertools
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang import remains
from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineEnded, EngineRequest, EngineSpec, Limits
from nitsum_sglang.warmup import warm_up
from nitsum_sglang.zygote_client import Zygote

from .conftest import StartEngine, collect, submit, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = list(range(10, 42))
KIND = node_pb2.Finish


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[1, 2], ids=["tp1", "tp2"])
async def engine(request: pytest.FixtureRequest, start_engine: StartEngine) -> AsyncIterator[object]:
    yield await start_engine(request.param)


@pytest_asyncio.fixture(loop_scope="module")
async def awake(engine):
    await engine.wake()
    yield engine
    await engine.park()


def awake_lines(state_dir):
    return [json.loads(line) for line in Path(state_dir, "awake.jsonl").read_text().splitlines()]


def left_over(engine):
    shm = {p.name for pid in engine.info.pids for p in Path("/dev/shm").glob(f"sgl_shm_*_{pid}_*")}
    return shm | {p.name for p in Path(engine.spec.state_dir).iterdir()}


async def drain(steps):
    async for _ in steps:
        pass


async def finish(engine, rid, sub):
    return (await collect(engine, [EngineRequest(rid, sub)]))[rid][-1].finish


async def test_starts_parked_and_holds_work_until_it_wakes(engine) -> None:
    engine.submit(EngineRequest("early.", submit(PROMPT, 4, ignore_eos=True)))
    steps = engine.steps()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(steps), 0.3)
    await engine.wake()
    await engine.wake()
    got = await collect(engine, [EngineRequest("then.", submit(PROMPT, 4, ignore_eos=True))])
    assert len(tokens(got["then."])) == 4
    await engine.park()
    await engine.park()


async def test_tokens_counts_and_finish(awake) -> None:
    logged = submit(PROMPT, 5, ignore_eos=True)
    logged.logprobs.start, logged.logprobs.top = 0, 2
    got = await collect(awake, [EngineRequest("a.", submit(PROMPT, 5, ignore_eos=True)), EngineRequest("b.", logged)])
    last = got["a."][-1]
    assert tokens(got["a."]) == tokens(got["b."])
    assert (last.finish.kind, last.prompt_tokens, last.completion_tokens) == (KIND.KIND_LENGTH, 32, 5)
    assert sum(len(d.input_logprobs.values) for d in got["b."]) == 32
    assert all(len(d.output_logprobs.values) == len(d.token_ids) == len(d.output_logprobs.top) for d in got["b."])
    stopped = await finish(awake, "c.", submit(PROMPT, 5, ignore_eos=False, stop_token_ids=[tokens(got["a."])[2]]))
    assert (stopped.kind, stopped.matched_token_id) == (KIND.KIND_STOP, tokens(got["a."])[2])


async def test_schedulers_alone_and_one_message_a_step(awake) -> None:
    """No HTTP server, tokenizer or detokenizer process; a step of four streams is one message, not four."""
    leader, *ranks = awake.info.pids
    assert len(ranks) == awake.spec.tp_size
    others = [p.cmdline() for p in psutil.Process(leader).children(recursive=True) if p.pid not in ranks]
    assert not [c for c in others if "multiprocessing.resource_tracker" not in " ".join(c)], "Python's own, of ranks that share memory"
    left = {f"s{i}." for i in range(4)}
    for rid in left:
        awake.submit(EngineRequest(rid, submit(PROMPT, 12, ignore_eos=True)))
    messages, deltas = 0, 0
    async for step in awake.steps():
        messages, deltas = messages + 1, deltas + len(step)
        left -= {d.request_id for d in step if d.HasField("finish")}
        if not left:
            break
    assert deltas == 48
    assert messages <= 12 + 4, "all four are prefilled within four steps and decode together"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vocabulary", lambda s: s.input_ids.append(5000)),
        ("resume_k", lambda s: setattr(s, "resume_k", 32)),
        ("empty", lambda s: s.ClearField("input_ids")),
        ("top_p", lambda s: setattr(s.sampling, "top_p", 3.0)),
        ("grammar", lambda s: setattr(s.sampling, "json_schema", "{not json")),
        ("regex", lambda s: setattr(s.sampling, "regex", "(")),
        ("logprobs", lambda s: s.logprobs.token_ids.append(1 << 20)),
        ("too long", lambda s: s.input_ids.extend([7] * 5000)),
    ],
)
async def test_a_bad_request_ends_alone(awake, name, change) -> None:
    bad = submit(PROMPT, 5)
    change(bad)
    got = await collect(awake, [EngineRequest("good.", submit(PROMPT, 5, ignore_eos=True)), EngineRequest("bad.", bad)])
    assert got["bad."][-1].finish.kind == KIND.KIND_ERROR, name
    assert got["bad."][-1].finish.status_code in (400, 500)
    assert got["bad."][-1].finish.message
    assert len(tokens(got["good."])) == 5


async def test_abort_ends_one_and_park_ends_all(awake) -> None:
    requests = [EngineRequest(f"long{i}.", submit(PROMPT, 2000, ignore_eos=True)) for i in range(3)]
    await collect(awake, requests, until=lambda got: all(got.values()))
    assert not await awake.flush_cache()
    awake.abort("long0.")
    awake.abort("unknown.")
    park = asyncio.create_task(awake.park())
    ended = {}
    async for step in awake.steps():
        ended |= {d.request_id: d for d in step if d.HasField("finish")}
        if len(ended) == 3:
            break
    await park
    assert {d.finish.kind for d in ended.values()} == {KIND.KIND_ABORTED}
    assert not any(d.token_ids for d in ended.values())
    # A pause right behind the step that ended the last request keeps it in SGLang's batch, its KV given back, until the next wake.
    if not await flushes(awake):
        await awake.wake()
        assert await flushes(awake), "an engine without requests does not flush"


async def flushes(engine: SchedulerEngine) -> bool:
    """Within a second: the last step's clean-up may still be under way when its deltas are here."""
    for _ in range(20):
        if await engine.flush_cache():
            return True
        await asyncio.sleep(0.05)
    return False


async def beside_long_prompts(engine, budget: int) -> tuple[dict[str, list[int]], int, list[float], list[int]]:
    """Three streams, and three long prompts that come in between: all tokens; how many the first stream got from then until those had
    their first; its waits from token to token, longest last; prefill tokens of each step beside streams, by the engine's log."""
    engine.govern(Limits(budget))
    logged = engine.log_path.stat().st_size
    short = [EngineRequest(f"short{i}.", submit([10 + i, *PROMPT], 80, ignore_eos=True)) for i in range(3)]
    long = [EngineRequest(f"long{i}.", submit([(7 * j + i) % 900 + 20 for j in range(600)], 4, ignore_eos=True)) for i in range(3)]
    long[2].submit.logprobs.start = 0  # what stock does not mix
    got = {r.rid: [] for r in short + long}
    left, at, since, meanwhile = set(got), [], 0, None
    for r in short:
        engine.submit(r)
    steps = engine.steps()
    async with asyncio.timeout(60):
        async for step in steps:
            for delta in step:
                got[delta.request_id].extend(delta.token_ids)
                if delta.HasField("finish"):
                    left.discard(delta.request_id)
            if any(d.request_id == "short0." for d in step):
                at.append(time.monotonic())
            if not since and all(len(got[r.rid]) >= 5 for r in short):
                since = len(got["short0."])
                for r in long:
                    engine.submit(r)
            if meanwhile is None and all(got[r.rid] for r in long):
                meanwhile = len(got["short0."]) - since
            if not left:
                break
    await steps.aclose()
    while not await engine.flush_cache():  # noqa: ASYNC110  nothing says when the last step's clean-up is over
        await asyncio.sleep(0.02)
    log = engine.log_path.read_bytes()[logged:].decode()
    found = re.findall(r"Prefill batch.*#new-token: (\d+),.*#running-req: (\d+)", log)
    chunks = [int(tokens) for tokens, running in found if int(running) >= 3]
    return got, meanwhile, sorted(b - a for a, b in itertools.pairwise(at)), chunks


async def test_a_budget_of_prefill_bounds_the_wait_and_changes_no_token(engine) -> None:
    await engine.wake()
    stock, _, stock_waits_s, chunks = await beside_long_prompts(engine, 0)
    assert max(chunks) >= 600, "stock prefills whole prompts first"
    governed, meanwhile, waits_s, chunks = await beside_long_prompts(engine, 100)
    assert governed == stock
    assert set(chunks) <= set(range(97)), "six pages of 16 are within 100"
    assert sum(chunks) == 1800
    assert meanwhile >= 1800 // 96 - 1, "a token of each stream beside, or after, each chunk"
    assert waits_s[-3] < 0.7 * stock_waits_s[-1], "but for two hiccups of a busy machine"
    await engine.park()
    await engine.wake()
    assert max((await beside_long_prompts(engine, 100))[3]) == 96, "kept over a park"
    await engine.park()
    engine.govern(Limits(200))
    await engine.wake()
    assert max((await beside_long_prompts(engine, 200))[3]) == 192, "changed while parked"
    await engine.park()
    engine.govern(Limits())


async def test_it_tells_what_its_steps_take(awake) -> None:
    """Decode steps of the batch and context that ran, in the time that they took; prefills with their tokens."""
    serial, began, n = awake.timings.serial, time.monotonic(), 0
    decodes, prefills = [], []
    while not (decodes and prefills) and time.monotonic() < began + 60:
        await collect(
            awake, [EngineRequest(f"t{n}.{i}.", submit([(7 * j + n) % 90 for j in range(256)], 64, ignore_eos=True)) for i in range(3)]
        )
        n += 1
        if awake.timings.serial > serial:  # before, they are of whatever ran last
            decodes += [s for s in awake.timings.steps if s.phase == "decode" and s.batch >= 2 and 256 <= s.context <= 320]
            prefills += [s for s in awake.timings.steps if s.phase == "prefill"]
    assert decodes, awake.timings
    assert prefills, awake.timings
    for s in decodes:
        assert (s.batch <= 3, s.tokens) == (True, 0)
        assert 0.2 < s.mean_ms < 1000 * (time.monotonic() - began) / s.count
    for s in prefills:
        assert s.batch == 0
        assert 16 <= s.tokens <= 3 * 256
        assert 0.2 < s.mean_ms < 1000 * (time.monotonic() - began) / s.count


async def test_warm_up_and_its_own_log(engine) -> None:
    await warm_up(engine)
    lines = awake_lines(engine.spec.state_dir)
    assert [line["event"] for line in lines] == ["wake", "park"] * (len(lines) // 2)
    assert [line["t"] for line in lines] == sorted(line["t"] for line in lines)
    assert lines[0]["gpus"] == list(engine.spec.gpu_uuids)


@pytest.mark.parametrize("tp", [1, 2])
async def test_a_killed_rank_is_the_engines_end(start_engine: StartEngine, tp: int) -> None:
    engine = await start_engine(tp)
    await engine.wake()
    engine.submit(EngineRequest("x.", submit(PROMPT, 3000, ignore_eos=True)))
    steps = engine.steps()
    await anext(steps)
    os.kill(engine.info.pids[-1], signal.SIGKILL)
    with pytest.raises(EngineEnded):
        await asyncio.wait_for(drain(steps), 10)
    with pytest.raises(EngineEnded):
        await engine.wake()
    await engine.stop()
    assert not any(map(remains.running, engine.info.pids))
    assert left_over(engine) == {"awake.jsonl", "engine.log"}


async def test_a_model_that_is_not_there_says_so(start_engine: StartEngine) -> None:
    with pytest.raises(EngineEnded, match="config"):
        await start_engine(1, extra_args=("--model-path", "/nonexistent"))


@pytest.mark.timeout(600)
async def test_where_forking_is_not_safe_engines_start_afresh(tmp_path, model_path: str) -> None:
    """A zygote that fails its self-check: each engine is a new process that imports SGLang and spawns its ranks. Slow, but serves."""
    zygote = Zygote(tmp_path / "z.sock", tmp_path / "zygote.log", preload=("prometheus_client",))
    await zygote.start()
    assert not zygote.forks
    assert zygote.alive
    assert "prometheus_client is loaded before fork" in (tmp_path / "zygote.log").read_text()
    engine = SchedulerEngine(EngineSpec("slow", model_path, "r0", 1, ("gpu0",), str(tmp_path / "e")), zygote)
    try:
        info = await engine.start()
        await engine.wake()
        got = await collect(engine, [EngineRequest("a.", submit(PROMPT, 4, ignore_eos=True))])
        assert len(tokens(got["a."])) == 4
        await engine.park()
        assert [line["event"] for line in awake_lines(engine.spec.state_dir)] == ["wake", "park"]
    finally:
        await engine.stop()
        await zygote.stop()
    assert not any(map(remains.running, info.pids))


async def test_the_hosts_fake_is_declared_to_be_an_engine() -> None:
    try:
        fake = importlib.import_module("nitsum_host.testing.fake_engine")
    except ModuleNotFoundError:
        pytest.skip("the host has no fake engine")
    names = {"start", "wake", "park", "govern", "submit", "abort", "steps", "flush_cache", "stop"}
    assert any(names <= set(dir(value)) for value in vars(fake).values() if isinstance(value, type))
