"""KV that one TP computed is found by another, and what comes out is what comes out without it."""

import tempfile

import pytest

from nitsum_sglang.port import EngineRequest

from .conftest import collect, submit, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [(11 * i) % 900 + 3 for i in range(300)]


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
async def test_pages_cross_tp(start_engine, first, second) -> None:
    with tempfile.TemporaryDirectory(prefix="nitsum-kv", dir="/dev/shm") as folder:
        want = None
        for tp, cached in ((first, 0), (second, 288)):
            engine = await start_engine(tp, kv_dir=folder)
            await engine.wake()
            deltas = (await collect(engine, [EngineRequest("a.", submit(PROMPT, 8, ignore_eos=True))]))["a."]
            assert deltas[-1].cached_tokens == cached
            want = want or tokens(deltas)
            assert tokens(deltas) == want
            await engine.stop()
