"""mTLS on a real port: the right role passes; a wrong role, a foreign CA and an expired certificate do not."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity, require_role, secure_channel, server_credentials


class Agent(agent_pb2_grpc.AgentServiceServicer):
    async def Describe(self, request: agent_pb2.DescribeRequest, context: grpc.aio.ServicerContext) -> agent_pb2.DescribeResponse:  # type: ignore[override]
        who = await require_role(context, "operator")
        return agent_pb2.DescribeResponse(agent_id=who.name)


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[str, dict[str, bytes]]]:
    ca = new_ca()
    s = grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Agent(), s)
    port = s.add_secure_port("127.0.0.1:0", server_credentials(folder(tmp_path / "agent", issue(ca, Identity("agent", "a0")))))
    await s.start()
    yield f"127.0.0.1:{port}", ca
    await s.stop(0)


async def call(address: str, certs: Path, role: str = "agent") -> agent_pb2.DescribeResponse:
    async with secure_channel(address, role, certs) as channel:
        return await agent_pb2_grpc.AgentServiceStub(channel).Describe(agent_pb2.DescribeRequest(), timeout=5)


async def test_the_right_role_passes(server: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, ca = server
    assert (await call(address, folder(tmp_path / "c", issue(ca, Identity("operator", "op"))))).agent_id == "op"


async def test_a_wrong_role_is_denied(server: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, ca = server
    with pytest.raises(grpc.aio.AioRpcError, match="only the operator may call this"):
        await call(address, folder(tmp_path / "c", issue(ca, Identity("gateway", "g"))))


async def test_a_server_of_another_role_is_refused(server: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, ca = server
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(address, folder(tmp_path / "c", issue(ca, Identity("operator", "op"))), role="host")
    assert e.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("case", ["foreign", "expired"])
async def test_foreign_and_expired_certificates_are_refused(server: tuple[str, dict[str, bytes]], tmp_path: Path, case: str) -> None:
    address, ca = server
    files = issue(new_ca(), Identity("operator", "op")) if case == "foreign" else issue(ca, Identity("operator", "op"), hours=-1)
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(address, folder(tmp_path / "c", {**files, "ca.crt": ca["tls.crt"]}))
    assert e.value.code() is grpc.StatusCode.UNAVAILABLE
