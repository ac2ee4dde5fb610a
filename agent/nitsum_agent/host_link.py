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


class HostLink:
    """`report` is the host's last word, None while it is away. `on_new_host` is called at every new incarnation."""

    def __init__(self, socket: str, on_new_host: Callable[[], Awaitable[None]]) -> None:
        self.channel = grpc.aio.insecure_channel(f"unix:{socket}", [("grpc.max_receive_message_length", 64 << 20)])
        self.stub = host_pb2_grpc.HostServiceStub(self.channel)
        self.on_new_host = on_new_host
        self.description: host_pb2.DescribeResponse | None = None
        self.report: agent_pb2.NodeReport | None = None
        self.version = 0
        """Grows with every report."""
        self.changed = asyncio.Condition()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            try:
                self.description = await self.stub.Describe(host_pb2.DescribeRequest(contract_version=CONTRACT_VERSION), timeout=5)
                incarnation = ""
                async for answer in self.stub.Watch(host_pb2.WatchRequest(interval_ms=500)):
                    failures = 0
                    if answer.incarnation != incarnation:
                        incarnation = answer.incarnation
                        await self.on_new_host()
                    await self._say(answer.report)
            except grpc.aio.AioRpcError as e:
                log.debug("host away: %s", e.details())
            await self._say(None)
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
            failures += 1

    async def _say(self, report: agent_pb2.NodeReport | None) -> None:
        async with self.changed:
            self.report, self.version = report, self.version + 1
            self.changed.notify_all()

    async def apply(self, directive: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse:
        """The host's own answer. Raises grpc.aio.AioRpcError when it is away."""
        answer = await self.stub.Apply(host_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=directive), timeout=30)
        return answer.answer

    async def close(self) -> None:
        await self.channel.close()
