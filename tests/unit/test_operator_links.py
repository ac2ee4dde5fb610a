"""A link to an agent over real gRPC: what it is told of GPUs, and of contracts that it does not speak."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_operator.links import Endpoint, Link, endpoints


class Agent(agent_pb2_grpc.AgentServiceServicer):
    """Describes what its host has told it so far."""

    def __init__(self) -> None:
        self.gpus: list[str] = []
        self.version = CONTRACT_VERSION
        self.described = 0
        self.node = ""

    async def Describe(self, request: Any, context: Any) -> agent_pb2.DescribeResponse:
        self.described += 1
        return agent_pb2.DescribeResponse(
            contract_version=self.version, agent_id="n", node_name=self.node, gpus=[agent_pb2.Gpu(uuid=u) for u in self.gpus]
        )

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[agent_pb2.WatchResponse]:
        while self.version == CONTRACT_VERSION:
            yield agent_pb2.WatchResponse(report=agent_pb2.NodeReport(agent_id="n", host_connected=bool(self.gpus)))
            await asyncio.sleep(0.02)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Agent, Link]]:
    agent, server = Agent(), grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    link = Link(Endpoint("n:1"), "agent", grpc.aio.insecure_channel(f"unix:{tmp_path}/s"))
    task = asyncio.create_task(link.follow())
    yield agent, link
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await link.channel.close()
    await server.stop(0)


async def until(probe: Callable[[], Any]) -> None:
    for _ in range(500):
        if probe():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 5 s")


async def test_an_agent_whose_host_comes_later_is_described_again(pair: tuple[Agent, Link]) -> None:
    agent, link = pair
    await until(lambda: link.report is not None)
    assert not link.described.gpus
    agent.gpus = ["g0"]
    await until(lambda: [g.uuid for g in link.described.gpus] == ["g0"])
    count = agent.described
    await asyncio.sleep(0.1)
    assert agent.described == count, "once"
    agent.gpus = []
    await until(lambda: not link.report.host_connected)
    agent.gpus = ["g0", "g1"]
    await until(lambda: [g.uuid for g in link.described.gpus] == ["g0", "g1"])


async def test_an_agent_of_another_contract_is_left_alone_until_it_speaks_ours(pair: tuple[Agent, Link]) -> None:
    agent, link = pair
    await until(lambda: link.report is not None)
    agent.version = "nitsum.v99"
    await until(lambda: link.trouble == "ContractVersionMismatch")
    assert (link.described, link.report) == (None, None)
    assert "bring both to one release" in link.problem
    agent.version = CONTRACT_VERSION
    await until(lambda: link.report is not None and not link.problem)


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        (Endpoint("n:1", "other"), "says that it runs on Node 'here', its EndpointSlice says 'other'"),
        (Endpoint("n:1", "here", pod="agent-x"), "says that it is agent 'n', its EndpointSlice says Pod 'agent-x'"),
    ],
)
async def test_an_agent_that_claims_to_be_another_is_left_alone(pair: tuple[Agent, Link], endpoint: Endpoint, problem: str) -> None:
    """Its certificate is as good as theirs."""
    agent, link = pair
    agent.node = "here"
    await until(lambda: link.report is not None)
    link.endpoint, agent.version = endpoint, "nitsum.v99"
    await until(lambda: link.trouble == "ContractVersionMismatch")
    agent.version = CONTRACT_VERSION
    await until(lambda: link.trouble == "WrongIdentity")
    assert (link.described, link.report, link.problem) == (None, None, problem)
    link.endpoint = Endpoint("n:1", "here", pod="n")
    await until(lambda: link.report is not None and not link.problem)


def test_endpoints_name_pod_and_node_as_kubernetes_does() -> None:
    def slice_of(pod: str, kind: str = "Pod", terminating: bool | None = None) -> Any:
        reference, conditions = SimpleNamespace(kind=kind, name=pod), SimpleNamespace(terminating=terminating)
        found = SimpleNamespace(addresses=["10.0.0.1"], node_name="n1", target_ref=reference, conditions=conditions)
        return SimpleNamespace(ports=[SimpleNamespace(name="agent", port=7443), SimpleNamespace(name="node", port=7444)], endpoints=[found])

    where = ("10.0.0.1:7443", "n1", "10.0.0.1:7444")
    assert endpoints([slice_of("x")], "agent") == (Endpoint(*where, "x"),)
    assert endpoints([slice_of("x", "Node")], "agent") == (Endpoint(*where),)
    both = [slice_of("a", terminating=True), slice_of("b", terminating=False)]
    for slices in (both, both[::-1]):
        assert endpoints(slices, "agent") == (Endpoint(*where, "b"),), "an address that another Pod has by now"
    assert endpoints(both[:1], "agent") == (Endpoint(*where, "a", True),)


class Gateway(gateway_pb2_grpc.GatewayServiceServicer):
    """Its clock is wrong by `ahead_s`."""

    ahead_s = 0.0

    async def Describe(self, request: Any, context: Any) -> gateway_pb2.DescribeResponse:
        return gateway_pb2.DescribeResponse(contract_version=CONTRACT_VERSION, gateway_id="gw")

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[gateway_pb2.WatchResponse]:
        while True:
            report = gateway_pb2.DemandReport(gateway_id="gw", window_s=1)
            report.window_end.FromSeconds(int(time.time() + self.ahead_s))
            yield gateway_pb2.WatchResponse(contract_version=CONTRACT_VERSION, report=report)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
async def test_windows_end_when_they_come_whatever_a_gateways_clock_says(tmp_path: Path, ahead_s: float) -> None:
    gateway, server = Gateway(), grpc.aio.server()
    gateway.ahead_s = ahead_s
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    link = Link(Endpoint("gw:1"), "gateway", grpc.aio.insecure_channel(f"unix:{tmp_path}/s"))
    task = asyncio.create_task(link.follow())
    try:
        await until(lambda: link.reports)
        assert link.reports[0].window_end.ToNanoseconds() / 1e9 == pytest.approx(time.time(), abs=5)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await link.channel.close()
        await server.stop(0)
