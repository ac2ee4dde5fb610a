from nitsum_api.node.v1 import node_pb2
from nitsum_host.testing.fake_engine import FakeEngine, next_token
from nitsum_sglang.port import EngineRequest, EngineSpec


async def _tokens(input_ids: list[int], resume_k: int, limit: int) -> list[int]:
    engine = FakeEngine(EngineSpec("e", "", "", 1, ("g",), ""))
    await engine.start()
    await engine.wake()
    sampling = node_pb2.Sampling(max_new_tokens=limit)
    engine.submit(EngineRequest("a.", node_pb2.Submit(input_ids=input_ids, resume_k=resume_k, sampling=sampling)))
    seen: list[int] = []
    async for step in engine.steps():
        seen += step[0].token_ids
        if step[0].HasField("finish"):
            break
    await engine.stop()
    return seen


async def test_a_resumed_stream_goes_on_where_it_was() -> None:
    whole = await _tokens([1, 2, 3], 0, 8)
    assert len(whole) == 8
    assert whole[0] == next_token([1, 2, 3])
    assert whole[:3] + await _tokens([1, 2, 3, *whole[:3]], 3, 8) == whole
