"""Real work before an engine counts as ready: the first flip to it must not be the first time that it computes.

A batch of several prompt lengths with a JSON schema, penalties, logprobs, a stop string and a resumed request: each loads code,
compiles a grammar or grows a buffer that would otherwise cost the first client a second or two.
"""

import asyncio

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang.port import Engine, EngineEnded, EngineRequest

SCHEMA = '{"type": "object", "properties": {"answer": {"type": "string", "maxLength": 8}}, "required": ["answer"]}'
TIMEOUT_S = 300.0
TOKENS = 12


def requests(count: int = 8) -> list[EngineRequest]:
    """Prompt tokens are small ids, which every vocabulary has."""
    made = []
    for i in range(count):
        submit = node_pb2.Submit(
            input_ids=[3 + (7 * i + j) % 90 for j in range(16 * (i + 1))],
            sampling=node_pb2.Sampling(max_new_tokens=TOKENS, top_k=1, temperature=1.0, ignore_eos=True, skip_special_tokens=True),
            cache_salt="nitsum.warm-up",
        )
        sampling = submit.sampling
        if i % 4 == 1:
            sampling.json_schema = SCHEMA
            sampling.ignore_eos = False
        elif i % 4 == 2:
            sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty = 0.5, 0.2, 1.1
            sampling.min_new_tokens = 2
            submit.resume_k = 4 if i > 4 else 0
        elif i % 4 == 3:
            submit.logprobs.start, submit.logprobs.top = -1, 2
            sampling.stop.append("\n\n")
            sampling.temperature, sampling.top_k, sampling.top_p = 0.8, 50, 0.95
        made.append(EngineRequest(f"warm-up.{i}.", submit))
    return made


async def warm_up(engine: Engine) -> None:
    """Wakes the engine, runs the batch twice, empties its cache and parks it. The caller has its GPUs to itself meanwhile.

    Reads `steps()`: call it before the host does, and let nobody else read until it returns. Raises EngineEnded.
    """
    await engine.wake()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for _ in range(2):
                await _run(engine)
    except TimeoutError:
        await engine.stop()
        raise EngineEnded(f"engine {engine.spec.engine_id} did not finish its warm-up within {TIMEOUT_S:.0f} s") from None
    await engine.flush_cache()
    await engine.park()


async def _run(engine: Engine) -> None:
    left = set()
    for request in requests():
        engine.submit(request)
        left.add(request.rid)
    steps = engine.steps()
    try:
        async for step in steps:
            left -= {delta.request_id for delta in step if delta.HasField("finish")}
            if not left:
                return
    finally:
        close = getattr(steps, "aclose", None)
        if close is not None:
            await close()
