"""A stream that moves from TP 1 to TP 2 in its middle is, token for token, the stream that did not move."""

import pytest

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang.port import EngineRequest, Limits

from .conftest import StartEngine, collect, logprobs, submit, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")
SCHEMA = '{"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}, "b": {"type": "integer"}}, "required": ["a", "b"]}'


def kinds() -> dict[str, node_pb2.Submit]:
    prompt = list(range(20, 60))
    with_logprobs = submit(prompt, 24, ignore_eos=True)
    with_logprobs.logprobs.start, with_logprobs.logprobs.top = 0, 2
    return {
        "plain": submit(prompt, 24, ignore_eos=True),
        "schema": submit(prompt, 40, json_schema=SCHEMA),
        "penalty": submit(prompt, 24, ignore_eos=True, frequency_penalty=1.0, presence_penalty=0.5),
        "stop": submit(prompt, 24, ignore_eos=True, stop=["set in the test"]),
        "min_tokens": submit(prompt, 24, min_new_tokens=20, logit_bias={"1": 100.0}),
        "logprobs": with_logprobs,
    }


async def test_a_move_is_not_seen(start_engine: StartEngine) -> None:
    from transformers import AutoTokenizer  # seconds, which every process that collects the tests would pay

    one, two = await start_engine(1), await start_engine(2)
    wanted = kinds()
    await one.wake()
    seen = tokens((await collect(one, [EngineRequest("seen.", wanted["plain"])]))["seen."])
    tokenizer = AutoTokenizer.from_pretrained(one.spec.model_path)
    texts = [tokenizer.decode(seen[i : i + 3]) for i in range(6, 20)]  # one that the model really produces, across the second cut
    wanted["stop"].sampling.stop[:] = [next(text for text in texts if "\ufffd" not in text)]
    plain = await collect(one, [EngineRequest(f"{name}.", s) for name, s in wanted.items()])

    for cut, budget in ((1, 0), (7, 16)):  # the second time in steps of a page of prefill beside decode, on both
        one.govern(Limits(budget))
        two.govern(Limits(budget))
        got = await collect(
            one,
            [EngineRequest(f"{name}.{cut}.", s) for name, s in wanted.items()],
            until=lambda got, cut=cut: all(len(tokens(d)) >= cut for d in got.values()),
        )
        await one.park()
        assert not one._live
        await two.wake()
        moved = {}
        for name, s in wanted.items():
            before = tokens(got[f"{name}.{cut}."])[:cut]
            again = node_pb2.Submit()
            again.CopyFrom(s)
            again.input_ids.extend(before)
            again.resume_k = cut
            moved[name] = EngineRequest(f"{name}.{cut}.again.", again)
        after = await collect(two, list(moved.values()))
        for name in wanted:
            whole, rest = plain[f"{name}."], after[moved[name].rid]
            before = tokens(got[f"{name}.{cut}."])[:cut]
            assert before + tokens(rest) == tokens(whole), name
            assert rest[-1].finish == whole[-1].finish, name
            assert rest[-1].completion_tokens == whole[-1].completion_tokens, name
            assert rest[-1].prompt_tokens == whole[-1].prompt_tokens == 40, name
        rest = after[moved["logprobs"].rid]
        assert logprobs(rest) == pytest.approx(logprobs(plain["logprobs."])[cut:], abs=1e-4)
        assert not any(d.input_logprobs.values for d in rest), "input logprobs are sent once"
        await two.park()
        await one.wake()
    assert plain["stop."][-1].finish.kind == node_pb2.Finish.KIND_STOP
    assert plain["stop."][-1].finish.matched_text
    assert tokens(plain["min_tokens."])[:20].count(1) == 0
    await one.stop()
    await two.stop()
