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
from nitsum_agent.obedience import Reason, judge, late, news, rejected, too_late
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.fault import maybe_die
from nitsum_api.host.v1 import host_pb2
from nitsum_api.security import require_role

Context = grpc.aio.ServicerContext[Any, Any]
WAITING_MAX = 8
DRAIN_MS_MAX = 3_600_000
INSPECT_MAX, INSPECT_S = 64, 8.0
INTERVAL_MS_MIN, INTERVAL_MS_MAX = 100, 60_000


class Agent(agent_pb2_grpc.AgentServiceServicer):
    def __init__(self, agent_id: str, node_name: str, node_group: str, node_address: str, host_socket: str, state_dir: Path) -> None:
        self.agent_id, self.node_name, self.node_group, self.node_address = agent_id, node_name, node_group, node_address
        self.state_dir = state_dir
        self.journal = Journal(state_dir)
        self.host = HostLink(host_socket, self._renew)
        self.problem = ""
        self._turn = asyncio.Lock()  # one directive at a time
        self._work = set[asyncio.Task[agent_pb2.ApplyResponse]]()

    async def _renew(self, report: agent_pb2.NodeReport) -> None:
        """To a host just met: what it has not answered yet, and to one that knows nothing, what is in force."""
        async with self._turn:
            memory, self.problem = self.journal.memory, ""
            known = self.host.description.applied_operation_id if self.host.description else ""
            if (pending := memory.pending) is not None:
                begun = pending.operation_id in (known, report.in_progress_operation_id)
                if late(pending, time.time()) and not begun:  # nobody waits for it any more, and the world has moved on
                    self.journal.answered(pending, too_late(memory))
                else:
                    await self._hand_over(pending)
            fresh = self.host.description is not None and not known
            if memory.directive is None or not memory.directive.operation_id or not fresh:
                return
            again = agent_pb2.NodeDirective()
            again.CopyFrom(memory.directive)
            again.ClearField("deadline")
            with contextlib.suppress(grpc.aio.AioRpcError):  # away again: the next incarnation gets it
                answer = await self.host.apply(again)
                if answer.WhichOneof("answer") == "rejected":
                    self.problem = f"the engine host refuses what was in force: {answer.rejected.message}"

    async def _hand_over(self, directive: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse | None:
        """The host's answer, journaled; None while the host is away: the directive stays pending for its next incarnation."""
        try:
            answer = await self.host.apply(directive)
        except grpc.aio.AioRpcError:
            self.host.owed = True  # it may live on, as after a deadline: handed over again at its next word
            return None
        maybe_die(FaultPoint.AGENT_FLIPPING, self.state_dir)
        if answer.WhichOneof("answer") == "rejected":
            answer.rejected.highest_term = self.journal.memory.highest_term
        self.journal.answered(directive, answer)
        return answer

    async def Describe(self, request: agent_pb2.DescribeRequest, context: Context) -> agent_pb2.DescribeResponse:
        await require_role(context, "operator")
        described, report, memory = self.host.description, self.host.report, self.journal.memory
        return agent_pb2.DescribeResponse(
            contract_version=CONTRACT_VERSION,
            agent_id=self.agent_id,
            node_name=self.node_name,
            node_group=self.node_group,
            node_address=self.node_address,
            gpus=self.host.gpus,
            refused_gpus=self.host.refused_gpus,
            models=report.models if report else [],
            engine_build=described.engine_build if described else "",
            highest_term=memory.highest_term,
            applied_generation=memory.generation,
            applied_operation_id=report.applied_operation_id if report else "",
        )

    async def Apply(self, request: agent_pb2.ApplyRequest, context: Context) -> agent_pb2.ApplyResponse:
        await require_role(context, "operator")
        if len(self._work) >= WAITING_MAX:
            text = f"{WAITING_MAX} directives wait for the engine host already"
            return rejected(Reason.REASON_HOST_UNAVAILABLE, text, self.journal.memory.highest_term)
        # Of its own: a caller that gives up leaves no directive whose answer nobody wrote down.
        work = asyncio.create_task(self._apply(request))
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        return await asyncio.shield(work)

    async def _apply(self, request: agent_pb2.ApplyRequest) -> agent_pb2.ApplyResponse:
        async with self._turn:
            directive, memory = request.directive, self.journal.memory
            self._hear(request.contract_version, directive.term)
            gpus = frozenset(g.uuid for g in self.host.gpus) if self.host.description else None
            answer = judge(memory, request, time.time(), gpus)
            if answer is not None:
                return answer
            if self.host.report is None:
                return rejected(
                    Reason.REASON_HOST_UNAVAILABLE, "the node's engine host does not answer; it is tried again", memory.highest_term
                )
            maybe_die(FaultPoint.AGENT_ACCEPTED, self.state_dir)
            self.journal.found_good(directive)
            maybe_die(FaultPoint.AGENT_JOURNALED, self.state_dir)
            answer = await self._hand_over(directive)
            return answer if answer is not None else agent_pb2.ApplyResponse(accepted=agent_pb2.ApplyResponse.Accepted())

    async def Inspect(self, request: agent_pb2.InspectRequest, context: Context) -> agent_pb2.InspectResponse:
        await require_role(context, "operator")
        await _same_contract(request.contract_version, context)
        if len(request.pools) > INSPECT_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{len(request.pools)} pools; ask about at most {INSPECT_MAX} at once")
        try:
            answer = await self.host.stub.Inspect(host_pb2.InspectRequest(pools=request.pools), timeout=INSPECT_S)
        except grpc.aio.AioRpcError as e:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the engine host did not read: {e.code().name} {e.details()}")
        return agent_pb2.InspectResponse(models=answer.models)

    def _hear(self, contract_version: str, term: int) -> None:
        """On disk before the answer: whoever led before this term is not obeyed again, also if this very call is refused."""
        if news(self.journal.memory, contract_version, term):
            self.journal.saw(term)

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
            report.problem = self.host.problem
        elif self.problem and not report.problem:
            report.problem = self.problem
        elif (slices := self.host.refused_gpus) and not report.problem:
            report.problem = f"{', '.join(slices)}: MIG slices cannot be used; give this node's pod whole GPUs"
        return report

    async def Watch(self, request: agent_pb2.WatchRequest, context: Context) -> AsyncIterator[agent_pb2.WatchResponse]:
        await require_role(context, "operator")
        await _same_contract(request.contract_version, context)
        interval_s = min(max(request.interval_ms or 1000, INTERVAL_MS_MIN), INTERVAL_MS_MAX) / 1e3
        while True:
            said = self.host.version
            yield agent_pb2.WatchResponse(contract_version=CONTRACT_VERSION, report=self._report())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s), self.host.changed:
                    # By number: what changed while the last report was on its way is not missed.
                    await self.host.changed.wait_for(lambda said=said: self.host.version != said)  # type: ignore[misc]

    async def Drain(self, request: agent_pb2.DrainRequest, context: Context) -> agent_pb2.DrainResponse:
        await require_role(context, "operator")
        await _same_contract(request.contract_version, context)
        if request.term < self.journal.memory.highest_term:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"term {request.term} is over")
        self._hear(request.contract_version, request.term)
        grace_ms = min(request.grace_ms, DRAIN_MS_MAX)
        try:
            await self.host.stub.Drain(host_pb2.DrainRequest(grace_ms=grace_ms), timeout=grace_ms / 1e3 + 10)
        except grpc.aio.AioRpcError as e:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the engine host did not drain: {e.code().name} {e.details()}")
        return agent_pb2.DrainResponse()


async def _same_contract(version: str, context: Context) -> None:
    """Aborts the call of a peer of another contract version: half understood is worse than refused."""
    if version != CONTRACT_VERSION:
        text = f"this agent speaks contract {CONTRACT_VERSION}, the caller {version or 'none'}: upgrade the older side"
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
