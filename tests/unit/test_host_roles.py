"""Streams go from the group that prefills to the one that decodes, token for token: no gRPC, no SGLang."""

from pathlib import Path

from nitsum_api.types.v1 import types_pb2
from nitsum_host.testing.world import World, world

PREFILL, DECODE, MIXED = types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE, types_pb2.ROLE_MIXED


async def roles(w: World, *wanted: int) -> None:
    report = await w.carried_out(w.directive(1, roles=wanted))
    assert not report.problem, report.problem


async def test_streams_are_handed_over_once_after_their_first_token(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await roles(w, PREFILL, DECODE)  # a change of role restarts nothing
        for i in range(5):
            w.gateway.start(str(i), 40)
        await w.until(lambda: len(w.node.groups["g1-1"].ledger.running) == 5)
        assert not w.node.groups["g1-0"].ledger.running
        await w.gateway.all_done()
        assert set(w.gateway.hops.values()) == {2}
        assert len(w.made["e1-0"]) == len(w.made["e1-1"]) == 1


async def test_without_a_group_that_decodes_streams_run_whole(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for other in (PREFILL, MIXED):
            await roles(w, PREFILL, other)
            w.gateway.start(str(other), 30)
            await w.gateway.all_done()
        assert set(w.gateway.hops.values()) == {1}


async def test_a_stream_that_comes_back_stays(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await roles(w, PREFILL, DECODE)
        w.gateway.start("a", 1000)
        await w.until(lambda: len(w.node.groups["g1-1"].ledger.running) == 1)
        w.engine("e1-1").crash()
        await w.until(lambda: bool(w.node.groups["g1-0"].ledger.running))
        await w.until(lambda: len(w.made["e1-1"]) == 2 and w.node.groups["g1-1"].state == types_pb2.GROUP_STATE_OPEN)
        assert w.node.groups["g1-0"].ledger.running
        await w.gateway.all_done()
        assert w.gateway.hops == {"a": 3}
        assert w.gateway.crashes == {"a": 1}


async def test_hand_over_and_flip_at_once_lose_no_token(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for turn in range(4):
            await roles(w, PREFILL, DECODE)
            for i in range(8):
                w.gateway.start(f"{turn}-{i}", 60)
            await w.carried_out(w.directive(2))
        await w.gateway.all_done()
