"""mTLS on a real port: the right role passes; a wrong role, a foreign CA, an expired certificate, none at all, old TLS do not."""

import asyncio
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.issue import expires_at, issue, new_ca
from nitsum_api.security import Identity, peer_identity, require_role, secure_channel, server_credentials, stamp


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


@pytest.mark.parametrize("case", ["foreign", "expired", "of a gateway"])
async def test_a_client_sends_nothing_to_a_server_that_is_not_who_it_should_be(tmp_path: Path, case: str) -> None:
    ca = new_ca()
    files = {
        "foreign": {**issue(new_ca(), Identity("agent", "a0")), "ca.crt": ca["tls.crt"]},
        "expired": issue(ca, Identity("agent", "a0"), hours=-1),
        "of a gateway": issue(ca, Identity("gateway", "a0"), extra_dns=("gateway.ns.svc", "localhost")),
    }[case]
    s = grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Agent(), s)
    port = s.add_secure_port("127.0.0.1:0", server_credentials(folder(tmp_path / "s", files)))
    await s.start()
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(f"127.0.0.1:{port}", folder(tmp_path / "c", issue(ca, Identity("operator", "op"))))
    assert e.value.code() is grpc.StatusCode.UNAVAILABLE
    await s.stop(0)


def handshake(address: str, context: ssl.SSLContext) -> bytes:
    """What the server says first, nothing if it hangs up. In TLS 1.3 a client learns only then that its certificate is missed."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as raw, context.wrap_socket(raw) as tls:
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        try:
            return tls.recv(9)
        except (ssl.SSLError, ConnectionError):
            return b""


def unchecked(certs: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certs is not None:
        context.load_cert_chain(certs / "tls.crt", certs / "tls.key")
    return context


async def test_without_a_certificate_there_is_no_connection(server: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, ca = server
    certs = folder(tmp_path / "c", issue(ca, Identity("operator", "op")))
    assert await asyncio.to_thread(handshake, address, unchecked(certs)), "the probe itself can get through"
    assert await asyncio.to_thread(handshake, address, unchecked()) == b""


@pytest.mark.filterwarnings("ignore:.*TLSv1:DeprecationWarning")
async def test_old_tls_is_refused(server: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, ca = server
    old = unchecked(folder(tmp_path / "c", issue(ca, Identity("operator", "op"))))
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(
        (ssl.SSLError, ConnectionResetError), match=r"UNEXPECTED_EOF|PROTOCOL_VERSION|reset"
    ):  # by the server, not by this side
        await asyncio.to_thread(handshake, address, old)


async def test_plaintext_is_refused(server: tuple[str, dict[str, bytes]]) -> None:
    address, _ = server
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await agent_pb2_grpc.AgentServiceStub(channel).Describe(agent_pb2.DescribeRequest(), timeout=5)
    assert e.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_rotation_to_another_ca_needs_no_restart_also_when_caught_half_way(
    server: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    address, ca = server
    before = folder(tmp_path / "before", issue(ca, Identity("operator", "op")))
    await call(address, before)
    new = new_ca()
    after = folder(tmp_path / "after", issue(new, Identity("operator", "op2")))
    fresh = issue(new, Identity("agent", "a0"))
    certs = tmp_path / "agent"
    (certs / "tls.crt").unlink()
    assert (await call(address, before)).agent_id == "op", "half written: the old one goes on"
    (certs / "tls.crt").write_bytes(fresh["tls.crt"])
    assert (await call(address, before)).agent_id == "op", "a key that does not fit its certificate is not taken either"
    for name, data in fresh.items():
        (certs / name).write_bytes(data)
    assert (await call(address, after)).agent_id == "op2"
    with pytest.raises(grpc.aio.AioRpcError):
        await call(address, before)


def test_a_rotation_to_older_files_is_seen(tmp_path: Path) -> None:
    ca = new_ca()
    certs = folder(tmp_path / "c", issue(ca, Identity("agent", "a0")))
    first = stamp(certs)
    assert stamp(certs) == first
    restored = tmp_path / "restored"
    restored.write_bytes(issue(ca, Identity("agent", "a0"))["tls.crt"])
    os.utime(restored, (1, 1))
    restored.replace(certs / "tls.crt")
    assert stamp(certs) != first


class Peer:
    """Stands for gRPC's context: what a certificate's names come out as."""

    def __init__(self, *names: str) -> None:
        self.names = [n.encode() for n in names]

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_subject_alternative_name": self.names}


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("operator.nitsum.internal", "spiffe://nitsum.io/operator/op"), "operator"),
        (("spiffe://nitsum.io/operator/op", "spiffe://nitsum.io/agent/a"), None),
        (("spiffe://nitsum.io/operator",), None),
        (("spiffe://nitsum.io/operator/a/b",), None),
        (("spiffe://nitsum.io/root/a",), None),
        (("spiffe://elsewhere.io/operator/a",), None),
        (("operator.nitsum.internal",), None),
        ((), None),
    ],
)
def test_an_identity_is_exactly_one_uri(names: tuple[str, ...], role: str | None) -> None:
    who = peer_identity(Peer(*names))  # type: ignore[arg-type]
    assert (who.role if who else None) == role


@pytest.mark.parametrize("name", ["host.nitsum.internal", "spiffe://nitsum.io/operator/x"])
def test_no_certificate_proves_a_second_role(name: str) -> None:
    with pytest.raises(AssertionError, match="another role"):
        issue(new_ca(), Identity("gateway", "g"), extra_dns=(name,))


def test_a_leaf_is_valid_now_and_not_for_long() -> None:
    now = datetime.now(UTC)
    assert timedelta() < expires_at(issue(new_ca(), Identity("agent", "a"))["tls.crt"]) - now < timedelta(days=31)


def test_no_code_and_no_flag_reaches_plaintext_on_a_network() -> None:
    root = Path(__file__).parents[2]
    sources = [f for room in ("agent", "cli", "engine", "gateway", "local", "operator", "proto") for f in (root / room).rglob("*.py")]
    lines = [(f, line) for f in sources if "_pb2" not in f.name for line in f.read_text().splitlines()]
    insecure = [(f, line) for f, line in lines if "insecure_" in line and "(" in line]
    assert len(insecure) >= 4, "the search itself finds something"
    assert [(f, line) for f, line in insecure if "unix:" not in line] == []
    assert [(f, line) for f, line in lines if re.search(r"--(insecure|plain|no-?tls|skip-?verify)|verify=False|CERT_NONE", line)] == []
