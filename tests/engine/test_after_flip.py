"""What comes after a flip is what a stock server that loaded the checkpoint itself makes: tokens, and teacher-forced logits."""

import asyncio
import functools
from collections.abc import Callable

import httpx
import pytest

from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import EngineRequest, EngineSpec
from nitsum_sglang.testing.stock import stock_server

from .conftest import collect, submit, tokens
from .test_weights import MADE, PROMPT, kilobytes, pss, weight_store

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def stock_scores(tmp_path_factory) -> Callable[[str], tuple[list[int], list[float]]]:
    """A stock server's 24 greedy tokens after PROMPT, and its logprobs of all positions but the first. TP 1, started once a model."""

    @functools.cache
    def scores(which: str) -> tuple[list[int], list[float]]:
        sampling = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        with stock_server(MADE[which](), tmp_path_factory.mktemp("stock")) as url:
            answer = httpx.post(url + "/generate", json=body, timeout=120).raise_for_status().json()["meta_info"]
        rows = [*answer["input_token_logprobs"][1:], *answer["output_token_logprobs"]]
        return [r[1] for r in answer["output_token_logprobs"]], [r[0] for r in rows]

    return scores


@pytest.mark.parametrize(("which", "degrees"), [("tiny", (1, 2, 4)), ("tiny", (2, 4)), ("smollm2", (1, 3))])
async def test_after_a_flip_logits_are_a_stock_servers(zygote, tmp_path, stock_scores, which, degrees) -> None:
    """All degrees resident on one store, the stream flips through them: (2, 4) is a pool whose smallest TP is 2."""
    model = str(MADE[which]())
    want_tokens, want = stock_scores(which)
    tmp_path.chmod(0o700)
    async with weight_store(model, tmp_path, "", zygote) as (socket, ready):
        engines = {
            tp: SchedulerEngine(
                EngineSpec(f"e{tp}", model, "r0", tp, tuple(f"gpu{i}" for i in range(tp)), str(tmp_path / f"e{tp}"), weight_socket=socket),
                zygote,
            )
            for tp in degrees
        }
        try:
            infos = [await e.start() for e in engines.values()]
            seen: list[int] = []
            for step, tp in enumerate([*degrees, degrees[0]][:3]):
                engine = engines[tp]
                await engine.wake()
                stream = submit([*PROMPT, *seen], 24, ignore_eos=True)
                stream.resume_k = len(seen)
                forced = submit([*PROMPT, *seen], 1, ignore_eos=True)
                forced.logprobs.start, forced.logprobs.top = 0, 1
                made = await collect(
                    engine, [EngineRequest(f"s{step}.", stream)], lambda got: all(len(tokens(d)) >= 8 for d in got.values())
                )
                seen = [*seen, *tokens(made[f"s{step}."])][: 8 * (step + 1)]
                assert seen == want_tokens[: len(seen)], f"after the flip to TP {tp}"
                scores = (await collect(engine, [EngineRequest(f"f{step}.", forced)]))[f"f{step}."]
                values = [v for d in scores for v in d.input_logprobs.values][1:]
                assert len(values) == len(forced.input_ids) - 1
                assert values == pytest.approx(want[: len(values)], abs=1e-4), f"teacher-forced at TP {tp}"
                await engine.park()
            pids = [pid for info in infos for pid in info.pids]
            assert sum(map(kilobytes, pids)) == 0
            assert sum(map(pss, pids)) << 10 <= ready["bytes"], "the layouts share one copy"
        finally:
            await asyncio.gather(*(e.stop() for e in engines.values()))
