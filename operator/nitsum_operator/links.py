"""Connections to agents and gateways: found by EndpointSlices, proven by mTLS and the handshake, heard by Watch."""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.conditions import Reason
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.security import secure_channel

CALL_S = 5.0
BACKOFF_MAX_S = 5.0
INTERVAL_MS = 1000
log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Endpoint:
    """`host:port` of a peer; `node_address` is the node data port beside an agent. The rest is Kubernetes' own word.

    `terminating`: its Pod is ending, its engine host with it.
    """

    address: str
    node_name: str = ""
    node_address: str = ""
    pod: str = ""
    terminating: bool = False


def endpoints(slices: list[Any], port_name: str) -> tuple[Endpoint, ...]:
    """Of one Service's EndpointSlices, sorted, each address once: of two Pods, the one that stays."""
    found: dict[str, Endpoint] = {}
    for s in slices:
        ports = {p.name: p.port for p in s.ports or []}
        for e in s.endpoints or []:
            for a in (e.addresses or [])[:1]:
                host = f"[{a}]" if ":" in a else a
                if ports.get(port_name):
                    node = f"{host}:{ports['node']}" if ports.get("node") else ""
                    pod = e.target_ref.name if e.target_ref is not None and e.target_ref.kind == "Pod" else ""
                    ending = bool(e.conditions is not None and e.conditions.terminating)
                    new = Endpoint(f"{host}:{ports[port_name]}", e.node_name or "", node, pod or "", ending)
                    if (other := found.get(new.address)) is None or (new.terminating, new) < (other.terminating, other):
                        found[new.address] = new
    return tuple(sorted(found.values()))


class LeftAlone(Exception):
    """The peer speaks another contract version, or claims to be another one."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def claims_another(endpoint: Endpoint, agent: agent_pb2.DescribeResponse) -> str:
    """What an agent says of itself and its EndpointSlice does not; empty where they agree, or the slice says nothing.

    A certificate cannot tell: all agents have one Secret, so it names the role alone.
    """
    if endpoint.node_name and agent.node_name and agent.node_name != endpoint.node_name:
        return f"says that it runs on Node {agent.node_name!r}, its EndpointSlice says {endpoint.node_name!r}"
    if endpoint.pod and agent.agent_id != endpoint.pod:
        return f"says that it is agent {agent.agent_id!r}, its EndpointSlice says Pod {endpoint.pod!r}"
    return ""


def _trouble(e: grpc.aio.AioRpcError | LeftAlone) -> tuple[Reason, str]:
    if isinstance(e, LeftAlone):
        return e.reason, str(e)
    details = e.details() or ""
    refused = e.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
    # gRPC reports a failed handshake as UNAVAILABLE; only its words tell it from a peer that is away.
    handshake = any(word in details for word in ("CERTIFICATE", "ertificate", "Peer name", "SSL_ERROR", "andshake"))
    return Reason.WRONG_IDENTITY if refused or handshake else Reason.AGENT_LOST, f"{e.code().name}: {details}"


@dataclass
class Link:
    """One peer. `heard_at` is monotonic seconds of the last report; `problem` says why there is none."""

    endpoint: Endpoint
    role: str
    channel: grpc.aio.Channel
    described: Any = None
    report: Any = None
    heard_at: float | None = None
    problem: str = ""
    trouble: Reason = Reason.AGENT_LOST
    """What kind of problem, while there is one."""
    task: asyncio.Task[None] | None = None
    reports: list[Any] = field(default_factory=list)
    """Gateways: windows not yet taken by the estimator, at most 64."""
    credentials: int = 0
    """Which certificate it was opened with."""

    @property
    def stub(self) -> Any:
        kind = agent_pb2_grpc.AgentServiceStub if self.role == "agent" else gateway_pb2_grpc.GatewayServiceStub
        return kind(self.channel)

    @property
    def highest_term(self) -> int:
        return max(self.described.highest_term if self.described else 0, self.report.highest_term if self.report else 0)

    async def follow(self) -> None:
        """Describe, then Watch, for ever; pauses between attempts grow to BACKOFF_MAX_S."""
        pb: Any = agent_pb2 if self.role == "agent" else gateway_pb2
        pause = 0.2
        while True:
            try:
                stub = self.stub
                await self._describe(stub, pb)
                complete = self.role == "gateway" or bool(self.described.gpus)
                async for answer in stub.Watch(pb.WatchRequest(contract_version=CONTRACT_VERSION, interval_ms=INTERVAL_MS)):
                    if self.role == "agent":
                        # GPUs are the host's to tell: an agent that came up before it, or outlived it, knows of them only now.
                        if answer.report.host_connected and not complete:
                            await self._describe(stub, pb)
                        complete = answer.report.host_connected
                    self.report, self.heard_at, self.problem, pause = answer.report, time.monotonic(), "", 0.2
                    if self.role == "gateway":
                        # By our clock: one whose own is behind would be stale for ever, one that is ahead fresh long after it has gone.
                        answer.report.window_end.GetCurrentTime()
                        self.reports = [*self.reports[-63:], answer.report]
                self.problem = "ended its report stream"
            except (grpc.aio.AioRpcError, LeftAlone) as e:
                self.trouble, text = _trouble(e)
                if text != self.problem:
                    log.warning("%s %s: %s", self.role, self.endpoint.address, text)
                self.problem = text
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MAX_S)

    async def _describe(self, stub: Any, pb: Any) -> None:
        described = await stub.Describe(pb.DescribeRequest(contract_version=CONTRACT_VERSION), timeout=CALL_S)
        if described.contract_version != CONTRACT_VERSION:
            self.described = self.report = None  # what it says is not understood, so it is left alone
            text = f"speaks contract {described.contract_version!r}, this operator {CONTRACT_VERSION!r}; bring both to one release"
            raise LeftAlone(Reason.CONTRACT_VERSION_MISMATCH, text)
        if self.role == "agent" and (text := claims_another(self.endpoint, described)):
            self.described = self.report = None
            raise LeftAlone(Reason.WRONG_IDENTITY, text)
        self.described, self.problem = described, ""


class Links:
    def __init__(self) -> None:
        self.agents: dict[str, Link] = {}
        self.gateways: dict[str, Link] = {}

    async def update(self, role: str, found: tuple[Endpoint, ...], tls: Path) -> None:
        """Opens links to new endpoints and closes those that are gone. A channel keeps the certificate that it was opened with, so a
        renewed one means a new channel; what is known of the peer stays."""
        links = self.agents if role == "agent" else self.gateways
        for address in set(links) - {e.address for e in found}:
            await self._close(links.pop(address))
        credentials = max((tls / name).stat().st_mtime_ns for name in ("ca.crt", "tls.crt", "tls.key"))
        for e in found:
            if e.address not in links or links[e.address].credentials != credentials:
                link = Link(e, role, secure_channel(e.address, role, tls), credentials=credentials)
                if (old := links.get(e.address)) is not None:
                    link.described, link.report, link.heard_at, link.reports = old.described, old.report, old.heard_at, old.reports
                    await self._close(old)
                links[e.address] = link
                link.task = asyncio.create_task(link.follow(), name=f"{role} {e.address}")
            links[e.address].endpoint = e  # its Pod may be ending, or be another one by now

    async def _close(self, link: Link) -> None:
        if link.task is not None:
            link.task.cancel()
            await asyncio.gather(link.task, return_exceptions=True)
        await link.channel.close()

    async def close(self) -> None:
        for link in [*self.agents.values(), *self.gateways.values()]:
            await self._close(link)

    @property
    def highest_term(self) -> int:
        return max((link.highest_term for link in [*self.agents.values(), *self.gateways.values()]), default=0)
