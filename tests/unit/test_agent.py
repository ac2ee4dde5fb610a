"""The agent over real gRPC and mTLS; in the host's place a small HostService on a real Unix socket (a declared port)."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

import nitsum_agent.host_link
import nitsum_agent.journal
import nitsum_agent.service
from nitsum.faults import FaultPoint
from nitsum_agent.host_link import HostLink
from nitsum_agent.journal import LINES_MAX, Journal
from nitsum_agent.main import CALLS_MAX
from nitsum_agent.obedience import NUMBER_MAX, Memory, Reason, judge, rejected
from nitsum_agent.service import Agent
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.host.v1 import host_pb2, host_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import MAX_MESSAGE_BYTES, Identity, secure_channel, server_credentials, server_options
from nitsum_api.types.v1 import types_pb2

ACCEPTED = agent_pb2.ApplyResponse(accepted=agent_pb2.ApplyResponse.Accepted())


class FakeHost(host_pb2_grpc.HostServiceServicer):
    """Accepts everything; remembers what it was asked."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation, self.applied = incarnation, list[str]()
        self.answer = ACCEPTED
        self.known = ""
        self.contract, self.problem = CONTRACT_VERSION, ""
        self.gpus = ["g0"]
        self.speaks, self.answers = asyncio.Event(), asyncio.Event()
        """Cleared: it hangs, in Watch or in Apply."""
        self.speaks.set()
        self.answers.set()

    async def Describe(self, request: host_pb2.DescribeRequest, context: object) -> host_pb2.DescribeResponse:
        known = self.applied[-1] if self.applied else self.known
        gpus = [agent_pb2.Gpu(uuid=u) for u in self.gpus]
        return host_pb2.DescribeResponse(
            contract_version=self.contract, gpus=gpus, incarnation=self.incarnation, applied_operation_id=known
        )

    async def Apply(self, request: host_pb2.ApplyRequest, context: object) -> host_pb2.ApplyResponse:
        await self.answers.wait()
        if request.directive.operation_id in self.applied:  # as the real one: the same id twice is one flip
            return host_pb2.ApplyResponse(answer=agent_pb2.ApplyResponse(already_done=agent_pb2.ApplyResponse.AlreadyDone()))
        self.applied.append(request.directive.operation_id)
        return host_pb2.ApplyResponse(answer=self.answer)

    async def Watch(self, request: host_pb2.WatchRequest, context: object) -> AsyncIterator[host_pb2.WatchResponse]:
        while True:
            await self.speaks.wait()
            done = self.applied[-1] if self.applied else ""
            report = agent_pb2.NodeReport(applied_operation_id=done, epoch=7, problem=self.problem)
            yield host_pb2.WatchResponse(incarnation=self.incarnation, report=report)
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
        ({"term": NUMBER_MAX + 1}, Reason.REASON_INVALID),
        ({"generation": NUMBER_MAX + 1}, Reason.REASON_INVALID),
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


def test_values_of_a_later_release_are_refused_by_name() -> None:
    mode, role = directive(), directive()
    agent_pb2.NodeDirective.MergeFromString(mode, b"\x40\x63")  # mode = 99
    role.layout[0].MergeFromString(b"\x40\x63")  # role = 99
    said = [judge(Memory(), request(d), 0.0, None) for d in (mode, role)]
    assert [a.rejected.reason for a in said if a] == [Reason.REASON_INVALID] * 2
    assert ["mode 99" in said[0].rejected.message, "role 99 of group g" in said[1].rejected.message] == [True, True]  # type: ignore[union-attr]


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


def test_the_journal_is_bounded_also_while_the_host_answers_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.answered(directive("op0", 1), ACCEPTED)
    for i in range(2, LINES_MAX + 4):
        journal.found_good(directive(f"op{i}", i))
    again = Journal(tmp_path)
    assert len(journal.path.read_text().splitlines()) < 10
    assert again.memory.pending == directive(f"op{LINES_MAX + 3}", LINES_MAX + 3), "compaction keeps what the host still owes an answer"
    assert again.memory.directive == directive("op0", 1)


def test_a_disk_that_fills_up_in_the_middle_of_a_line_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.answered(directive("op1", 1), ACCEPTED)

    def half(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(nitsum_agent.journal, "write_all", half)
        with pytest.raises(OSError, match="No space left"):
            journal.found_good(directive("op2", 2))
    assert journal.memory.pending is None
    journal.answered(directive("op3", 3), ACCEPTED)
    assert Journal(tmp_path).memory == journal.memory


def test_a_journal_of_a_later_version_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.answered(directive("op1", 1), ACCEPTED)
    entry = json.loads(journal.path.read_text())
    entry["directive"]["fieldOfTomorrow"] = {"a": 1}
    entry["directive"]["mode"] = "FLIP_MODE_OF_TOMORROW"
    journal.path.write_text(json.dumps(entry) + "\n")
    assert Journal(tmp_path).memory.directive == directive("op1", 1)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "directives.jsonl").write_text('{"term": 1}\n{"ter\n{"term": 2}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Journal(tmp_path)


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
        self.server = grpc.aio.server(options=server_options())
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


class Died(Exception):
    pass


@pytest.mark.parametrize("point", [FaultPoint.AGENT_ACCEPTED, FaultPoint.AGENT_JOURNALED, FaultPoint.AGENT_FLIPPING])
async def test_killed_between_any_two_steps_the_same_order_is_one_flip(
    certs: Path, monkeypatch: pytest.MonkeyPatch, point: FaultPoint
) -> None:
    host, server = await start_host(certs / "h.sock", "one")

    def die(here: FaultPoint, _: Path) -> None:
        if here == point:
            raise Died

    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        with monkeypatch.context() as m:
            m.setattr(nitsum_agent.service, "maybe_die", die)
            with pytest.raises(grpc.aio.AioRpcError, match="Died"):
                await r.apply(directive("op1", 1, 3))
    assert Journal(certs / "state").memory.highest_term == 3, "whoever led before is not obeyed again, wherever the agent died"
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        answer = await r.apply(directive("op1", 1, 3))
        assert answer.WhichOneof("answer") in ("accepted", "already_done")
        assert host.applied == ["op1"]
        assert r.agent.journal.memory.directive == directive("op1", 1, 3)
    await server.stop(0)


@pytest.mark.parametrize("how", ["unknown gpu", "already done", "host away", "drain"])
async def test_a_term_counts_from_when_it_is_heard_whatever_the_answer(certs: Path, how: str) -> None:
    _, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        await r.apply(directive("op1", 1, 4))
        heard = directive("op1" if how == "already done" else "op2", 2, 9)
        if how == "unknown gpu":
            heard.layout[0].gpu_uuids[:] = ["elsewhere"]
        if how == "host away":
            await server.stop(0)
            await eventually(lambda: r.host.report is None)
        if how == "drain":
            with pytest.raises(grpc.aio.AioRpcError, match="the engine host did not drain: UNIMPLEMENTED"):
                await r.stub.Drain(agent_pb2.DrainRequest(contract_version=CONTRACT_VERSION, term=9), timeout=5)
        else:
            await r.apply(heard)
    async with Running(certs) as r:
        answer = await r.apply(directive("op3", 3, 8))
        assert answer.rejected.reason == Reason.REASON_STALE_TERM
        assert answer.rejected.highest_term == 9
    await server.stop(0)


async def test_two_leaders_at_once_end_with_the_higher_term(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        orders = [directive(f"op-{term}-{n}", 10 * term + n, term) for n in range(4) for term in (5, 6)]
        answers = await asyncio.gather(*(r.apply(d) for d in orders))
        taken = [d for d, a in zip(orders, answers, strict=True) if a.WhichOneof("answer") == "accepted"]
        assert r.agent.journal.memory.highest_term == 6
        assert [d.operation_id for d in taken if d.term == 6], "the leader is obeyed"
        after = host.applied.index(next(i for i in host.applied if i.startswith("op-6")))
        assert all(i.startswith("op-6") for i in host.applied[after:]), "and nobody else from then on"
    await server.stop(0)


async def test_a_caller_that_gives_up_leaves_no_answer_unwritten(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        host.answers.clear()
        with pytest.raises(grpc.aio.AioRpcError, match="Deadline"):
            await r.stub.Apply(request(directive()), timeout=0.2)
        host.answers.set()
        await eventually(lambda: r.agent.journal.memory.generation == 1)
        assert (await r.apply(directive())).WhichOneof("answer") == "already_done"
        assert host.applied == ["op1"]
    await server.stop(0)


async def test_a_message_past_the_limit_is_refused_and_the_next_one_heard(certs: Path) -> None:
    files = [(certs / "operator" / n).read_bytes() for n in ("ca.crt", "tls.key", "tls.crt")]
    options = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "agent.nitsum.internal")]
    async with Running(certs) as r:
        async with grpc.aio.secure_channel(f"127.0.0.1:{r.port}", grpc.ssl_channel_credentials(*files), options) as channel:
            huge = agent_pb2.ApplyRequest(contract_version="x" * (MAX_MESSAGE_BYTES + 1))
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await agent_pb2_grpc.AgentServiceStub(channel).Apply(huge, timeout=10)
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await r.apply(directive())).rejected.reason == Reason.REASON_HOST_UNAVAILABLE


async def test_waiting_directives_are_bounded(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        host.answers.clear()
        calls = [asyncio.create_task(r.apply(directive(f"op{n}", n))) for n in range(1, 30)]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert "wait for the engine host already" in done.pop().result().rejected.message
        assert len(r.agent._work) <= nitsum_agent.service.WAITING_MAX
        host.answers.set()
        await asyncio.gather(*calls)
    await server.stop(0)


async def test_a_host_that_hung_in_apply_is_told_again_at_its_next_word(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nitsum_agent.host_link, "APPLY_S", 0.2)
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        host.answers.clear()
        assert (await r.apply(directive())).WhichOneof("answer") == "accepted", "it is in the journal"
        assert host.applied == []
        host.answers.set()
        await eventually(lambda: r.agent.journal.memory.generation == 1)
        assert host.applied == ["op1"]
    await server.stop(0)


async def test_a_host_that_says_nothing_is_not_reported_as_if_it_did(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nitsum_agent.host_link, "SILENCE_S", 0.3)
    host, server = await start_host(certs / "h.sock", "one")
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        host.speaks.clear()
        await eventually(lambda: r.host.report is None)
        assert "hangs" in r.agent._report().problem
        assert (await r.apply(directive())).rejected.reason == Reason.REASON_HOST_UNAVAILABLE
        host.speaks.set()
        await eventually(lambda: r.host.report is not None)
        assert (await r.apply(directive())).WhichOneof("answer") == "accepted"
    await server.stop(0)


async def test_a_host_of_another_contract_is_named_and_left_alone(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    host.contract = "v0"
    async with Running(certs) as r:
        await eventually(lambda: "speaks contract v0" in r.agent._report().problem)
        assert (await r.apply(directive())).rejected.reason == Reason.REASON_HOST_UNAVAILABLE
        assert host.applied == []
    await server.stop(0)


async def test_for_a_watcher_that_does_not_read_nothing_piles_up(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    host.problem = "x" * (4 << 20)
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        made, report = list[float](), r.agent._report
        monkeypatch.setattr(r.agent, "_report", lambda: made.append(time.monotonic()) or report())
        stream = r.stub.Watch(agent_pb2.WatchRequest(contract_version=CONTRACT_VERSION, interval_ms=100))
        await stream.read()
        await asyncio.sleep(0.6)  # the connection's windows fill
        before, filled = r.host.version, len(made)
        await eventually(lambda: r.host.version > before + 15)
        assert len(made) <= filled + 1, "the host said more than 15 times what it does since"
        stream.cancel()
    await server.stop(0)


async def test_mig_slices_are_refused(certs: Path) -> None:
    host, server = await start_host(certs / "h.sock", "one")
    host.gpus = ["MIG-1c1b", "g0"]
    async with Running(certs) as r:
        await eventually(lambda: r.host.report is not None)
        described = await r.stub.Describe(agent_pb2.DescribeRequest(contract_version=CONTRACT_VERSION), timeout=5)
        assert [g.uuid for g in described.gpus] == ["g0"]
        assert list(described.refused_gpus) == ["MIG-1c1b"]
        on_slice = directive()
        on_slice.layout[0].gpu_uuids[:] = ["MIG-1c1b"]
        assert (await r.apply(on_slice)).rejected.reason == Reason.REASON_UNKNOWN_GPU
        assert "MIG slices cannot be used" in r.agent._report().problem
    await server.stop(0)


async def test_an_order_whose_deadline_passed_while_the_agent_was_down_is_not_carried_out(certs: Path) -> None:
    journal = Journal(certs / "state")
    journal.answered(directive("op1", 1), ACCEPTED)
    old = directive("op2", 2)
    old.deadline.FromSeconds(int(time.time()) - 1)
    journal.found_good(old)
    host, server = await start_host(certs / "h.sock", "one")
    host.known = "op1"
    async with Running(certs) as r:
        await eventually(lambda: r.agent.journal.memory.pending is None)
        assert (await r.apply(old)).rejected.reason == Reason.REASON_DEADLINE_PASSED
        assert r.agent.journal.memory.generation == 1
        assert host.applied == []
    await server.stop(0)


async def test_as_a_process_it_bounds_its_callers_and_ends_when_told(certs: Path, unused_tcp_port: int) -> None:
    argv = {
        "listen": f"127.0.0.1:{unused_tcp_port}",
        "tls-dir": certs / "agent",
        "host-socket": certs / "h.sock",
        "state-dir": certs / "state",
    }
    argv |= {"agent-id": "a0", "node-name": "n0", "node-address": "127.0.0.1:1"}
    command = [sys.executable, "-m", "nitsum_agent.main", *(f"--{k}={v}" for k, v in argv.items())]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    try:
        async with secure_channel(f"127.0.0.1:{unused_tcp_port}", "agent", certs / "operator") as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            watch = agent_pb2.WatchRequest(contract_version=CONTRACT_VERSION, interval_ms=60_000)
            streams = [stub.Watch(watch, wait_for_ready=True, timeout=60) for _ in range(70)]
            ends = [asyncio.create_task(s.code()) for s in streams]
            async with asyncio.timeout(30):
                while sum(e.done() for e in ends) < 70 - CALLS_MAX:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            codes = [e.result() for e in ends if e.done()]
            assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * (70 - CALLS_MAX)
            for s in streams:
                s.cancel()
            await asyncio.gather(*ends)
        again = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        _, said = await asyncio.wait_for(again.communicate(), 10)
        assert again.returncode == 1
        assert b"another agent uses --state-dir" in said
        elsewhere = [*command, f"--state-dir={certs / 'other'}"]
        again = await asyncio.create_subprocess_exec(*elsewhere, stderr=subprocess.PIPE)
        _, said = await asyncio.wait_for(again.communicate(), 10)
        assert again.returncode == 1
        assert b"Failed to bind" in said
        process.send_signal(signal.SIGTERM)
        _, said = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0
        assert b"PRIVATE" not in said
    finally:
        if process.returncode is None:
            process.kill()
