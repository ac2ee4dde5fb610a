"""The node data port over real gRPC and mTLS, fake engines behind it: what a gateway may do wrong, and what is left when it goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from nitsum_api import CONTRACT_VERSION
from nitsum_api.issue import issue, new_ca
from nitsum_api.node.v1 import node_pb2, node_pb2_grpc
from nitsum_api.security import Identity, secure_channel, server_credentials
from nitsum_host import port as port_module
from nitsum_host import streams
from nitsum_host.testing.world import World, world

Request, Refused = node_pb2.AttachRequest, node_pb2.Refused
HELLO = Request(hello=node_pb2.Hello(contract_version=CONTRACT_VERSION, gateway_id="t"))


@dataclass
class Door:
    w: World
    channel: grpc.aio.Channel

    def attach(self) -> Any:
        return node_pb2_grpc.NodeServiceStub(self.channel).Attach()

    async def attached(self) -> Any:
        call = self.attach()
        await call.write(HELLO)
        assert (await call.read()).HasField("welcome")
        assert (await call.read()).HasField("view")
        return call

    def submit(self, request_id: str, tokens: int = 5, **fields: Any) -> node_pb2.AttachRequest:
        group = self.w.node.groups["g1-0"]
        s = node_pb2.Submit(**{"request_id": request_id, "group_id": "g1-0", "epoch": group.wire.epoch, "input_ids": [1, 2]} | fields)
        s.sampling.max_new_tokens = tokens
        return Request(submit=s)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    ca = new_ca()
    for role in ("host", "gateway"):
        (tmp_path / role).mkdir()
        for name, data in issue(ca, Identity(role, "t")).items():
            (tmp_path / role / name).write_bytes(data)
    async with AsyncExitStack() as stack:
        w = await stack.enter_async_context(world(tmp_path))
        server = grpc.aio.server()
        node_pb2_grpc.add_NodeServiceServicer_to_server(port_module.NodePort(w.node), server)
        number = server.add_secure_port("127.0.0.1:0", server_credentials(tmp_path / "host"))
        await server.start()
        stack.push_async_callback(server.stop, 0)
        yield Door(w, await stack.enter_async_context(secure_channel(f"127.0.0.1:{number}", "host", tmp_path / "gateway")))


async def refusal(call: Any) -> node_pb2.Refused:
    async with asyncio.timeout(5):
        while True:
            frame = await call.read()
            assert frame is not grpc.aio.EOF, await call.details()
            if frame.HasField("refused"):
                refused: node_pb2.Refused = frame.refused
                return refused


async def test_what_is_wrong_with_a_submission_is_said_and_nothing_is_kept(door: Door) -> None:
    call = await door.attached()
    epoch = door.w.node.groups["g1-0"].wire.epoch
    for frame, reason in (
        (door.submit("a", group_id="nowhere"), Refused.REASON_UNKNOWN_GROUP),
        (door.submit("b", epoch=epoch + 1), Refused.REASON_MOVED),
        (door.submit("c", epoch=0), Refused.REASON_MOVED),
        (door.submit(""), Refused.REASON_INVALID),
        (door.submit("d", input_ids=[]), Refused.REASON_INVALID),
        (door.submit("e", resume_k=2), Refused.REASON_INVALID),
        (door.submit("f", input_ids=range(9000)), Refused.REASON_TOO_LONG),
    ):
        await call.write(frame)
        refused = await refusal(call)
        assert (refused.request_id, refused.reason) == (frame.submit.request_id, reason)
    assert not door.w.node.streams
    await call.write(Request())  # an empty frame, and the abort of what is not there
    await call.write(Request(abort=node_pb2.Abort(request_id="zzz")))
    await call.write(door.submit("twice", 100_000))
    await call.write(door.submit("twice"))
    assert (await refusal(call)).reason == Refused.REASON_INVALID
    assert len(door.w.node.streams) == 1


async def test_a_stream_without_hello_or_of_another_contract_is_ended(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "HELLO_S", 0.1)
    silent = door.attach()
    assert await silent.code() == grpc.StatusCode.FAILED_PRECONDITION
    for first in (door.submit("a"), Request(hello=node_pb2.Hello(contract_version="0"))):
        call = door.attach()
        await call.write(first)
        assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert door.w.node.sessions == {door.w.gateway}


async def test_a_gateway_that_goes_frees_engine_and_ledger(door: Door) -> None:
    call = await door.attached()
    for i in range(4):  # the first alone fills the KV capacity: the others queue
        await call.write(door.submit(f"r{i}", 100_000))
    await door.w.until(lambda: len(door.w.node.streams) == 4)
    call.cancel()
    await door.w.until(lambda: not door.w.node.streams and not door.w.engine("e1-0")._live)
    ledger = door.w.node.groups["g1-0"].ledger
    assert not ledger.running
    assert not ledger.queued_total
    assert door.w.node.sessions == {door.w.gateway}


class Stuck:
    """The server's side of a call whose gateway reads nothing: the network has taken all that it takes."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_subject_alternative_name": [Identity("gateway", "t").uri.encode()]}

    async def write(self, frame: node_pb2.AttachResponse) -> None:
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise RuntimeError(f"{code.name}: {details}")


async def test_a_gateway_that_does_not_read_is_cut_off(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "FRAMES_MAX", 20)

    async def frames() -> AsyncIterator[node_pb2.AttachRequest]:
        yield HELLO
        yield door.submit("r", 1_000_000)
        await asyncio.Event().wait()

    context: Any = Stuck()
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED: the gateway left 20 frames unread"):
        async with asyncio.timeout(5):
            await port_module.NodePort(door.w.node).Attach(frames(), context)
    assert door.w.node.sessions == {door.w.gateway}
    await door.w.until(lambda: not door.w.node.streams)


async def test_a_bug_in_one_frame_ends_the_session_not_the_node(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    call = await door.attached()
    with monkeypatch.context() as m:
        m.setattr(streams, "submit", lambda node, session, submit: 1 / 0)
        await call.write(door.submit("a"))
        async with asyncio.timeout(5):
            while await call.read() is not grpc.aio.EOF:
                pass
    assert (await door.attached()) is not None
