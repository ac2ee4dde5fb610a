"""A prefill and a decode group on one node, chosen by hand: every kind of stream is handed over and equals a stock engine's."""

import re
import tempfile
from pathlib import Path

import pytest

from nitsum_local.node import DECODE, GPUS, MODEL, PREFILL, Node
from nitsum_sglang.testing.models import tiny_llama

from .conftest import MAX_TOKENS, Expected
from .kinds import Seen, together

pytestmark = pytest.mark.asyncio(loop_scope="session")
PREFILLED = re.compile(r"Prefill batch.*#new-token: (\d+), #cached-token: (\d+)")


async def _served(folder: Path, expected: Expected) -> tuple[dict[str, Seen], str, str]:
    """(what clients saw, logs of all processes, what the decode engine logged of it)."""
    async with Node(folder, tiny_llama(), {"p": GPUS[:1], "d": GPUS[1:]}) as node:
        await node.wake({"p": PREFILL, "d": DECODE})
        with (folder / "h/e/d/engine.log").open() as log:
            log.seek(0, 2)
            async with node.http() as client:
                seen = await together(client, MODEL, MAX_TOKENS, expected.stop)
            return seen, node.logs(), log.read()


@pytest.mark.timeout(600)
async def test_every_kind_of_stream_is_handed_over_from_prefill_to_decode(expected: Expected) -> None:
    with tempfile.TemporaryDirectory(prefix="nr") as folder:
        seen, logs, decode = await _served(Path(folder), expected)
    wrong = [f"{k}: {s.differs(expected.seen[k])}" for k, s in seen.items() if s.key() != expected.seen[k].key()]
    assert not wrong, "\n".join([*wrong, logs])
    batches = [(int(new), int(cached)) for new, cached in PREFILLED.findall(decode)]
    new, cached = sum(n for n, _ in batches), sum(c for _, c in batches)
    assert cached > 2 * new, f"the decode engine loads what the other has prefilled: {batches}"
