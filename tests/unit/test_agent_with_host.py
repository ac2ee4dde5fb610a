"""The agent over mTLS and the real host service over its Unix socket; only the engines are the port's fake."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

import nitsum_agent.service
from nitsum.faults import FaultPoint
from nitsum_agent.service import Agent
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.host.v1 import host_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity, secure_channel, server_credentials, server_options
from nitsum_api.types.v1 import types_pb2
from nitsum_host.engines import Engines, Settings
from nitsum_host.journal import Journal
from nitsum_host.node import Node
from nitsum_host.service import Host
from nitsum_host.testing.fake_engine import FakeEngine

POOL = types_pb2.PoolRef(name="default/p")


class AnyModel(Host):
    """No checkpoint is read."""

    def _inspect(self, pool: agent_pb2.PoolDirective) -> agent_pb2.ModelFacts:
        return agent_pb2.ModelFacts(model=pool.model.name, revision="r", legal_tp=[1, 2])


@contextlib.asynccontextmanager
async def host_on(folder: Path) -> AsyncIterator[Host]:
    journal = Journal(folder)
    node = Node(journal.epoch + 1)
    settings = Settings(folder, folder / "memory", weight_store=False, make=lambda spec: FakeEngine(spec))
    engines = Engines(node, settings, lambda engine_id: host.engine_ended(engine_id))
    host = AnyModel(node, engines, journal, folder, [agent_pb2.Gpu(uuid="g0")], "127.0.0.1:1")
    server = grpc.aio.server(options=server_options())
    host_pb2_grpc.add_HostServiceServicer_to_server(host, server)
    server.add_insecure_port(f"unix:{folder / 'h.sock'}")
    await server.start()
    yield host
    await server.stop(0)
    await engines.stop()
    journal.close()


@contextlib.asynccontextmanager
async def agent_on(certs: Path, socket: Path) -> AsyncIterator[tuple[Agent, agent_pb2_grpc.AgentServiceStub]]:
    agent = Agent("a0", "n0", "g", "127.0.0.1:1", str(socket), certs / "state")
    server = grpc.aio.server(options=server_options())
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(certs / "agent"))
    await server.start()
    link = asyncio.create_task(agent.host.run())
    async with secure_channel(f"127.0.0.1:{port}", "agent", certs / "operator") as channel:
        await eventually(lambda: agent.host.report is not None)
        yield agent, agent_pb2_grpc.AgentServiceStub(channel)
    link.cancel()
    await server.stop(0)
    await agent.host.close()


async def eventually(test: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not test():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def order(number: int, engine: str) -> agent_pb2.ApplyRequest:
    """Both engines resident, this one serves."""
    d = agent_pb2.NodeDirective(operation_id=f"op{number}", generation=number, term=1, mode=types_pb2.FLIP_MODE_ABORT)
    d.pools.add(pool=POOL, model=types_pb2.Model(name="m", source=types_pb2.ModelSource(path="/m")))
    for name in ("a", "b"):
        d.residency.add(engine_id=name, model="m", tp_size=1, gpu_uuids=["g0"])
    group = d.layout.add(
        group_id=f"on-{engine}", pool=POOL, engine_id=engine, model="m", tp_size=1, gpu_uuids=["g0"], role=types_pb2.ROLE_MIXED
    )
    group.capacity.max_running = 4
    d.deadline.FromSeconds(int(time.time()) + 60)
    return agent_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=d)


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    ca = new_ca()
    (tmp_path / "host").mkdir()
    for role in ("agent", "operator"):
        (tmp_path / role).mkdir()
        for name, data in issue(ca, Identity(role, "x")).items():
            (tmp_path / role / name).write_bytes(data)
    return tmp_path


class Died(Exception):
    pass


@pytest.mark.parametrize("point", [FaultPoint.AGENT_ACCEPTED, FaultPoint.AGENT_JOURNALED, FaultPoint.AGENT_FLIPPING])
async def test_an_agent_that_dies_in_a_flip_costs_nothing_and_the_order_is_one_flip(
    certs: Path, monkeypatch: pytest.MonkeyPatch, point: FaultPoint
) -> None:
    def die(here: FaultPoint, _: Path) -> None:
        if here == point:
            raise Died

    async with host_on(certs / "host") as host:
        async with agent_on(certs, certs / "host/h.sock") as (_, stub):
            assert (await stub.Apply(order(1, "a"), timeout=5)).WhichOneof("answer") == "accepted"
            await eventually(lambda: host.applied == "op1")
            epoch = host.node.epoch
            with monkeypatch.context() as m:
                m.setattr(nitsum_agent.service, "maybe_die", die)
                with pytest.raises(grpc.aio.AioRpcError, match="Died"):
                    await stub.Apply(order(2, "b"), timeout=5)
        if point == FaultPoint.AGENT_FLIPPING:  # nobody is there to tell the host anything
            await eventually(lambda: host.applied == "op2")
        async with agent_on(certs, certs / "host/h.sock") as (agent, stub):
            assert (await stub.Apply(order(2, "b"), timeout=5)).WhichOneof("answer") in ("accepted", "already_done")
            await eventually(lambda: host.applied == "op2")
            assert (await stub.Apply(order(2, "b"), timeout=5)).WhichOneof("answer") == "already_done"
            assert agent.journal.memory.generation == 2
        assert host.node.epoch == epoch + 1, "one flip"
        assert [i for i, s in host.node.slots.items() if s.state == agent_pb2.EngineReport.STATE_AWAKE] == ["b"]


async def test_a_host_that_restarts_alone_gets_the_order_in_force_again(certs: Path) -> None:
    async with contextlib.AsyncExitStack() as hosts:
        host = await hosts.enter_async_context(host_on(certs / "host"))
        async with agent_on(certs, certs / "host/h.sock") as (_, stub):
            for number, engine in ((1, "a"), (2, "b")):
                await stub.Apply(order(number, engine), timeout=5)
                await eventually(lambda number=number: host.applied == f"op{number}")  # type: ignore[misc]
            before = host.node.epoch
            await hosts.aclose()
            host = await hosts.enter_async_context(host_on(certs / "host"))
            await eventually(lambda: host.applied == "op2")
            assert list(host.node.groups) == ["on-b"]
            assert host.node.epoch > before, "no gateway takes the old group for the new one"


async def test_what_could_not_be_read_is_read_again_when_it_is_asked_for(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the agent to its host; both by Inspect and by a directive, and what is said names its source."""

    def missing(self: Host, pool: agent_pb2.PoolDirective) -> agent_pb2.ModelFacts:
        return agent_pb2.ModelFacts(model=pool.model.name, problem="no config.json there")

    asked = agent_pb2.InspectRequest(contract_version=CONTRACT_VERSION, pools=order(1, "a").directive.pools)
    async with host_on(certs / "host") as host, agent_on(certs, certs / "host/h.sock") as (_, stub):
        with monkeypatch.context() as m:
            m.setattr(AnyModel, "_inspect", missing)
            assert (await stub.Apply(order(1, "a"), timeout=5)).rejected.message == "model m: no config.json there"
            (facts,) = (await stub.Inspect(asked, timeout=5)).models
            assert (facts.problem, facts.source.path) == ("no config.json there", "/m")
            assert host.models["m"] == facts
        (facts,) = (await stub.Inspect(asked, timeout=5)).models
        assert (facts.problem, list(facts.legal_tp), facts.source.path) == ("", [1, 2], "/m")
        assert host.models["m"] == facts, "what was remembered of it is over"
        elsewhere = agent_pb2.InspectRequest(contract_version=CONTRACT_VERSION, pools=asked.pools)
        elsewhere.pools[0].model.source.path = "/other"
        await stub.Inspect(elsewhere, timeout=5)
        assert host.models["m"] == facts, "asking about another source changes nothing of what is in use"
        assert (await stub.Apply(order(2, "a"), timeout=5)).WhichOneof("answer") == "accepted"
        await eventually(lambda: host.applied == "op2")
        elsewhere.contract_version = "another"
        with pytest.raises(grpc.aio.AioRpcError, match="upgrade the older side"):
            await stub.Inspect(elsewhere, timeout=5)
