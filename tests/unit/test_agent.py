"""The agent over real gRPC and mTLS; in the host's place a small HostService on a real Unix socket (a declared port)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

from nitsum_agent.host_link import HostLink
from nitsum_agent.journal import LINES_MAX, Journal
from nitsum_agent.obedience import Memory, Reason, judge, rejected
from nitsum_agent.service import Agent
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.host.v1 import host_pb2, host_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity, secure_channel, server_credentials
from nitsum_api.types.v1 import types_pb2

ACCEPTED = agent_pb2.ApplyResponse(accepted=agent_pb2.ApplyResponse.Accepted())


class FakeHost(host_pb2_grpc.HostServiceServicer):
    """Accepts everything; remembers what it was asked."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation, self.applied = incarnation, list[str]()
        self.answer = ACCEPTED
        self.known = ""

    async def Describe(self, request: host_pb2.DescribeRequest, context: object) -> host_pb2.DescribeResponse:
        known = self.applied[-1] if self.applied else self.known
        return host_pb2.DescribeResponse(
            contract_version=CONTRACT_VERSION, gpus=[agent_pb2.Gpu(uuid="g0")], incarnation=self.incarnation, applied_operation_id=known
        )

    async def Apply(self, request: host_pb2.ApplyRequest, context: object) -> host_pb2.ApplyResponse:
        self.applied.append(request.directive.operation_id)
        return host_pb2.ApplyResponse(answer=self.answer)

    async def Watch(self, request: host_pb2.WatchRequest, context: object) -> AsyncIterator[host_pb2.WatchResponse]:
        while True:
            done = self.applied[-1] if self.applied else ""
            yield host_pb2.WatchResponse(incarnation=self.incarnation, report=agent_pb2.NodeReport(applied_operation_id=done, epoch=7))
            await asyncio.sleep(0.05)


async def start_host(socket: Path, incarnation: str) -> tuple[FakeHost, grpc.aio.Server]:
    host, server = FakeHost(incarnation), grpc.aio.server()
    host_pb2_grpc.add_HostServiceServicer_to_server(host, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    return host, server


def directive(operation_id: str = "op1", generation: int = 1, term: int = 1) -> agent_pb2.NodeDirective:
    layout = [types_pb2.Group(group_id="g", engine_id="e", tp_size=1, gpu_uuids=["g0"])]
    return agent_pb2.NodeDirective(operation_id=operation_id, generation=generation, term=term, layout=layout)


def request(d: agent_pb2.NodeDirective, version: str = CONTRACT_VERSION) -> agent_pb2.ApplyRequest:
    return agent_pb2.ApplyRequest(contract_version=version, directive=d)


async def eventually(test: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not test():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"term": 1}, Reason.REASON_STALE_TERM),
        ({"generation": 3}, Reason.REASON_STALE_GENERATION),
        ({"operation_id": ""}, Reason.REASON_INVALID),
    ],
)
def test_what_is_not_obeyed(change: dict[str, object], reason: int) -> None:
    memory = Memory(highest_term=2, generation=3)
    d = directive("op9", 4, 2)
    for name, value in change.items():
        setattr(d, name, value)
    answer = judge(memory, request(d), 0.0, frozenset({"g0"}))
    assert answer is not None
    assert answer.rejected.reason == reason
    assert answer.rejected.highest_term == 2


def test_deadline_gpu_and_contract() -> None:
    late = directive()
    late.deadline.FromSeconds(100)
    reasons = [
        judge(Memory(), request(late), 101.0, frozenset()),
        judge(Memory(), request(directive()), 0.0, frozenset({"other"})),
        judge(Memory(), request(directive(), "v0"), 0.0, frozenset()),
    ]
    expected = [Reason.REASON_DEADLINE_PASSED, Reason.REASON_UNKNOWN_GPU, Reason.REASON_CONTRACT_VERSION]
    assert [r.rejected.reason for r in reasons if r] == expected
    assert judge(Memory(), request(directive()), 0.0, frozenset({"g0"})) is None


def test_the_journal_survives_a_cut_at_every_byte(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.answered(directive("op1", 1, 1), ACCEPTED)
    first = journal.path.stat().st_size
    journal.answered(directive("op2", 2, 5), ACCEPTED)
    data = journal.path.read_bytes()
    for cut in range(len(data) + 1):
        journal.path.write_bytes(data[:cut])
        memory = Journal(tmp_path).memory
        assert memory.highest_term == (5 if cut == len(data) else 1 if cut >= first else 0)
        assert len(memory.answers) == (2 if cut == len(data) else 1 if cut >= first else 0)


def test_the_journal_is_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i in range(1, LINES_MAX + 3):
        journal.answered(directive(f"op{i}", i, 3), ACCEPTED)
    again = Journal(tmp_path)
    assert again.memory.highest_term == 3
    assert again.memory.generation == LINES_MAX + 2
    assert len(journal.path.read_text().splitlines()) < 10
    assert again.memory.answers[f"op{LINES_MAX}"] == ACCEPTED, "compaction keeps the answers"
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_what_the_host_never_answered_is_pending_and_not_in_force(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.answered(directive("op1", 1, 1), ACCEPTED)
    journal.found_good(directive("op2", 2, 2))
    memory = Journal(tmp_path).memory
    assert memory.pending is not None
    assert memory.pending.operation_id == "op2"
    assert (memory.generation, memory.highest_term) == (1, 2)
    journal.answered(directive("op2", 2, 2), rejected(Reason.REASON_INVALID, "no"))
    memory = Journal(tmp_path).memory
    assert memory.pending is None
    assert memory.directive is not None
    assert (memory.directive.operation_id, memory.generation) == ("op1", 1)


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    ca = new_ca()
    for role in ("agent", "operator", "gateway"):
        (tmp_path / role).mkdir()
        for name, data in issue(ca, Identity(role, "x")).items():
            (tmp_path / role / name).write_bytes(data)
    return tmp_path


class Running:
    """An agent on a real port."""

    def __init__(self, certs: Path) -> None:
        self.certs = certs

    async def __aenter__(self) -> "Running":
        self.agent = Agent("a0", "n0", "g", "127.0.0.1:1", str(self.certs / "h.sock"), self.certs / "state")
        self.server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self.agent, self.server)
        self.port = self.server.add_secure_port("127.0.0.1:0", server_credentials(self.certs / "agent"))
        await self.server.start()
        self.link: asyncio.Task[None] = asyncio.create_task(self.agent.host.run())
        self.channel = secure_channel(f"127.0.0.1:{self.port}", "agent", self.certs / "operator")
        self.stub = agent_pb2_grpc.AgentServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.link.cancel()
        await self.channel.close()
        await self.server.stop(0)
        await self.agent.host.close()

    @property
    def host(self) -> HostLink:
        return self.agent.host

    async def apply(self, d: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse:
        return await self.stub.Apply(request(d), timeout=5)


async def test_apply_once_however_often_it_is_sent_and_again_to_a_new_host(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        assert (await r.apply(directive())).WhichOneof("answer") == "accepted"
        assert (await r.apply(directive())).WhichOneof("answer") == "already_done"
        assert host.applied == ["op1"]
        await server.stop(0)
        host, server = await start_host(certs / "h.sock", "two")
        await eventually(lambda: host.applied == ["op1"])
        described = await r.stub.Describe(agent_pb2.DescribeRequest(contract_version=CONTRACT_VERSION), timeout=5)
        assert described.highest_term == 1
        assert [g.uuid for g in described.gpus] == ["g0"]
    await server.stop(0)


async def test_a_restarted_agent_remembers_terms_and_answers(certs: Path) -> None:
    _, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        await r.apply(directive("op1", 1, 4))
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        assert (await r.apply(directive("op1", 1, 4))).WhichOneof("answer") == "already_done"
        assert (await r.apply(directive("op2", 2, 3))).rejected.reason == Reason.REASON_STALE_TERM
    await server.stop(0)


async def test_the_hosts_rejection_is_passed_on_and_the_old_directive_stays_in_force(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        await r.apply(directive())
        rejection = agent_pb2.ApplyResponse.Rejected(reason=Reason.REASON_NOT_RESIDENT, message="engine e9 is not resident")
        host.answer = agent_pb2.ApplyResponse(rejected=rejection)
        assert (await r.apply(directive("op2", 2))).rejected.message == "engine e9 is not resident"
    memory = Journal(certs / "state").memory
    assert memory.directive is not None
    assert memory.directive.operation_id == "op1"
    await server.stop(0)


async def test_a_directive_that_the_host_never_saw_reaches_it_after_a_restart(certs: Path) -> None:
    journal = Journal(certs / "state")
    journal.answered(directive("op1", 1), ACCEPTED)
    journal.found_good(directive("op2", 2))  # and here the agent was killed
    host, server = await start_host(certs / "h.sock", "one")
    host.known = "op1"
    async with Running(certs) as r:
        await eventually(lambda: host.applied == ["op2"])
        await eventually(lambda: r.agent.journal.memory.generation == 2)
    await server.stop(0)


async def test_a_host_that_went_on_is_not_told_again_what_it_does(certs: Path) -> None:
    Journal(certs / "state").answered(directive("op1", 1), ACCEPTED)
    host, server = await start_host(certs / "h.sock", "one")
    host.known = "op1"
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        assert (await r.apply(directive("op3", 3))).WhichOneof("answer") == "accepted"
        assert host.applied == ["op3"]
    await server.stop(0)


async def test_another_contract_is_told_so_and_left_alone(certs: Path) -> None:
    async with Running(certs) as r:
        assert (await r.stub.Describe(agent_pb2.DescribeRequest(contract_version="v0"), timeout=5)).contract_version == CONTRACT_VERSION
        with pytest.raises(grpc.aio.AioRpcError, match="upgrade the older side"):
            async for _ in r.stub.Watch(agent_pb2.WatchRequest(contract_version="v0")):
                pass
        with pytest.raises(grpc.aio.AioRpcError, match="upgrade the older side"):
            await r.stub.Drain(agent_pb2.DrainRequest(contract_version="v0", term=9), timeout=5)


async def test_without_its_host_it_says_so(certs: Path) -> None:
    async with Running(certs) as r:
        assert (await r.apply(directive())).rejected.reason == Reason.REASON_HOST_UNAVAILABLE
        async for answer in r.stub.Watch(agent_pb2.WatchRequest(contract_version=CONTRACT_VERSION)):
            assert not answer.report.host_connected
            break


async def test_only_the_operator_may_call(certs: Path) -> None:
    async with Running(certs) as r, secure_channel(f"127.0.0.1:{r.port}", "agent", certs / "gateway") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="only the operator may call this"):
            await agent_pb2_grpc.AgentServiceStub(channel).Apply(request(directive()), timeout=5)
