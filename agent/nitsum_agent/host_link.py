"""The agent's line to the engine host of its node: a Unix socket, tried again for as long as the agent lives."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.host.v1 import host_pb2, host_pb2_grpc

log = logging.getLogger(__name__)
RETRY_S = (0.1, 0.2, 0.5, 1.0)
"""Waits between attempts; the last one repeats."""
INTERVAL_MS = 500
SILENCE_S = 10.0
"""A host that says nothing for so long hangs: its last word is no longer reported as if it were true."""
APPLY_S = 30.0
MIG = "MIG-"
"""How NVIDIA's ids of MIG slices begin. A slice has no fast link to others: no TP group can lie on it, and it is refused."""


class HostLink:
    """`report` is the host's last word, None while it is away. `on_new_host` hears the first report of every meeting."""

    def __init__(self, socket: str, on_new_host: Callable[[agent_pb2.NodeReport], Awaitable[None]]) -> None:
        self.channel = grpc.aio.insecure_channel(f"unix:{socket}", [("grpc.max_receive_message_length", 64 << 20)])
        self.stub = host_pb2_grpc.HostServiceStub(self.channel)
        self.on_new_host = on_new_host
        self.description: host_pb2.DescribeResponse | None = None
        self.report: agent_pb2.NodeReport | None = None
        self.problem = "the engine host does not answer"
        """Why there is no report."""
        self.owed = False
        """A call failed while the host may live on: `on_new_host` is due though the incarnation is the same."""
        self.version = 0
        """Grows with every report."""
        self.changed = asyncio.Condition()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            heard = False
            try:
                heard = await self._follow()
            except grpc.aio.AioRpcError as e:
                log.debug("host away: %s", e.details())
                self.problem = "the engine host does not answer"
            except TimeoutError:
                log.warning("the engine host says nothing for %.0f s", SILENCE_S)
                self.problem = f"the engine host hangs: no word for {SILENCE_S:.0f} s"
            heard = heard or self.report is not None
            await self._say(None)
            failures = 0 if heard else failures + 1
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])

    async def _follow(self) -> bool:
        """One meeting with the host, to its end. True if it was another one by the time it was watched."""
        described = await self.stub.Describe(host_pb2.DescribeRequest(contract_version=CONTRACT_VERSION), timeout=5)
        if described.contract_version != CONTRACT_VERSION:  # half understood is worse than refused
            theirs = described.contract_version or "none"
            self.problem = f"the engine host speaks contract {theirs}, this agent {CONTRACT_VERSION}: bring both to one release"
            return False
        self.description = described
        call = self.stub.Watch(host_pb2.WatchRequest(interval_ms=INTERVAL_MS))
        try:
            met = False
            while True:
                async with asyncio.timeout(SILENCE_S):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    return False
                assert isinstance(answer, host_pb2.WatchResponse)
                if answer.incarnation != described.incarnation:  # restarted between the two calls: what it described is gone
                    return True
                if not met or self.owed:
                    met, self.owed = True, False
                    await self.on_new_host(answer.report)
                await self._say(answer.report)
        finally:
            call.cancel()

    @property
    def gpus(self) -> list[agent_pb2.Gpu]:
        """Those that can be used."""
        return [g for g in self.description.gpus if not g.uuid.startswith(MIG)] if self.description else []

    @property
    def refused_gpus(self) -> list[str]:
        return [g.uuid for g in self.description.gpus if g.uuid.startswith(MIG)] if self.description else []

    async def _say(self, report: agent_pb2.NodeReport | None) -> None:
        async with self.changed:
            self.report, self.version = report, self.version + 1
            self.changed.notify_all()

    async def apply(self, directive: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse:
        """The host's own answer. Raises grpc.aio.AioRpcError when it is away."""
        answer = await self.stub.Apply(host_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=directive), timeout=APPLY_S)
        return answer.answer

    async def close(self) -> None:
        await self.channel.close()
