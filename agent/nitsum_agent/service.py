"""AgentService: the operator's only way to a node. Checks, journals, hands on to the host, reports."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from nitsum.faults import FaultPoint
from nitsum_agent.host_link import HostLink
from nitsum_agent.journal import Journal
from nitsum_agent.obedience import Reason, judge, rejected
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.fault import maybe_die
from nitsum_api.host.v1 import host_pb2
from nitsum_api.security import require_role

Context = grpc.aio.ServicerContext[Any, Any]
INTERVAL_MS_MIN, INTERVAL_MS_MAX = 100, 60_000


class Agent(agent_pb2_grpc.AgentServiceServicer):
    def __init__(self, agent_id: str, node_name: str, node_group: str, node_address: str, host_socket: str, state_dir: Path) -> None:
        self.agent_id, self.node_name, self.node_group, self.node_address = agent_id, node_name, node_group, node_address
        self.state_dir = state_dir
        self.journal = Journal(state_dir)
        self.host = HostLink(host_socket, self._renew)
        self._turn = asyncio.Lock()  # one directive at a time

    @property
    def gpu_uuids(self) -> frozenset[str]:
        return frozenset(g.uuid for g in self.host.description.gpus) if self.host.description else frozenset()

    async def _renew(self) -> None:
        """A host that was started anew knows nothing; one that was here all along answers `already done`."""
        directive = self.journal.memory.directive
        if directive is None or not directive.operation_id:
            return
        again = agent_pb2.NodeDirective()
        again.CopyFrom(directive)
        again.ClearField("deadline")
        with contextlib.suppress(grpc.aio.AioRpcError):  # away again: the next incarnation gets it
            await self.host.apply(again)

    async def Describe(self, request: agent_pb2.DescribeRequest, context: Context) -> agent_pb2.DescribeResponse:
        await require_role(context, "operator")
        described, report, memory = self.host.description, self.host.report, self.journal.memory
        return agent_pb2.DescribeResponse(
            contract_version=CONTRACT_VERSION,
            agent_id=self.agent_id,
            node_name=self.node_name,
            node_group=self.node_group,
            node_address=self.node_address,
            gpus=described.gpus if described else [],
            models=report.models if report else [],
            engine_build=described.engine_build if described else "",
            highest_term=memory.highest_term,
            applied_generation=memory.generation,
            applied_operation_id=report.applied_operation_id if report else "",
        )

    async def Apply(self, request: agent_pb2.ApplyRequest, context: Context) -> agent_pb2.ApplyResponse:
        await require_role(context, "operator")
        async with self._turn:
            answer = judge(self.journal.memory, request, time.time(), self.gpu_uuids)
            if answer is not None:
                return answer
            directive, memory = request.directive, self.journal.memory
            if self.host.report is None:
                return rejected(
                    Reason.REASON_HOST_UNAVAILABLE, "the node's engine host does not answer; it is tried again", memory.highest_term
                )
            maybe_die(FaultPoint.AGENT_ACCEPTED, self.state_dir)
            # Accepted before the host hears of it: if we die now, the restarted agent hands it over.
            accepted = agent_pb2.ApplyResponse(accepted=agent_pb2.ApplyResponse.Accepted())
            previous = memory.directive, memory.generation
            self.journal.write(directive, accepted)
            maybe_die(FaultPoint.AGENT_JOURNALED, self.state_dir)
            try:
                answer = await self.host.apply(directive)
            except grpc.aio.AioRpcError:
                return accepted  # the next incarnation of the host gets it
            maybe_die(FaultPoint.AGENT_FLIPPING, self.state_dir)
            if answer.WhichOneof("answer") == "rejected":
                answer.rejected.highest_term = memory.highest_term
                self.journal.write(directive, answer)
                if previous[0] is not None:  # what was in force before still is
                    self.journal.write(previous[0], accepted)
                memory.directive, memory.generation = previous
                return answer
            return accepted

    def _report(self) -> agent_pb2.NodeReport:
        report = agent_pb2.NodeReport()
        if self.host.report is not None:
            report.CopyFrom(self.host.report)
        report.agent_id = self.agent_id
        report.observed_at.GetCurrentTime()
        report.highest_term = self.journal.memory.highest_term
        report.applied_generation = self.journal.memory.generation
        report.host_connected = self.host.report is not None
        if not report.host_connected:
            report.problem = "the engine host does not answer"
        return report

    async def Watch(self, request: agent_pb2.WatchRequest, context: Context) -> AsyncIterator[agent_pb2.WatchResponse]:
        await require_role(context, "operator")
        interval_s = min(max(request.interval_ms or 1000, INTERVAL_MS_MIN), INTERVAL_MS_MAX) / 1e3
        while True:
            yield agent_pb2.WatchResponse(contract_version=CONTRACT_VERSION, report=self._report())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s), self.host.changed:
                    await self.host.changed.wait()

    async def Drain(self, request: agent_pb2.DrainRequest, context: Context) -> agent_pb2.DrainResponse:
        await require_role(context, "operator")
        if request.term < self.journal.memory.highest_term:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"term {request.term} is over")
        await self.host.stub.Drain(host_pb2.DrainRequest(grace_ms=request.grace_ms), timeout=request.grace_ms / 1e3 + 10)
        return agent_pb2.DrainResponse()
