"""KV that one TP computed is found by another, and what comes out is what comes out without it."""

import tempfile
from pathlib import Path

import pytest

from nitsum_sglang.port import EngineEnded, EngineRequest

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


async def test_salts_and_revisions_share_nothing_and_the_folder_stays_small(start_engine) -> None:
    """On real engines: what a tenant's KV is found by, and what never finds it."""
    limit = 1 << 20
    with tempfile.TemporaryDirectory(prefix="nitsum-kv", dir="/dev/shm") as folder:
        one = await start_engine(1, kv_dir=folder)
        await one.wake()
        want = await cached(one, "acme")
        two = await start_engine(2, kv_dir=folder)
        await two.wake()
        assert [await cached(two, salt) for salt in ("other", "", "acme")] == [(0, want[1]), (0, want[1]), (288, want[1])]
        newer = await start_engine(1, kv_dir=folder, revision="r1", kv_max_bytes=limit)
        await newer.wake()
        assert bytes_in(folder) > limit
        assert await cached(newer, "acme") == (0, want[1]), "another revision's KV"
        assert 0 < bytes_in(folder) <= limit, "whoever writes next makes room, in every revision's folder"
        for engine in (one, two, newer):
            await engine.stop()


async def test_kv_without_a_revision_is_refused(start_engine) -> None:
    with pytest.raises(EngineEnded, match="revision: empty"):
        await start_engine(1, kv_dir="/dev/shm/nitsum-never", revision="")


async def cached(engine, salt: str) -> tuple[int, list[int]]:
    """Tokens of the prompt that were not computed; the output."""
    request = submit(PROMPT, 8, ignore_eos=True)
    request.cache_salt = salt
    deltas = (await collect(engine, [EngineRequest(f"{salt}.", request)]))[f"{salt}."]
    return deltas[-1].cached_tokens, tokens(deltas)


def bytes_in(folder: str) -> int:
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file() and p.name != "used")
