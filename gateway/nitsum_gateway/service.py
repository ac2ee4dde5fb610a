"""GatewayService for the operator, FrontService for the routers of this gateway's own fronts."""

import asyncio
import contextlib
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from nitsum_api import CONTRACT_VERSION
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.security import require_role
from nitsum_gateway.fronts import Fronts

Context = grpc.aio.ServicerContext[Any, Any]
Rejected = gateway_pb2.ApplyRoutesResponse.Rejected
PENDING_MAX = 600
"""Demand windows kept for a watcher that reads too slowly."""
WATCHERS_MAX = 16


class State:
    """Highest term and the routes in force, on disk, so that a restarted gateway serves on without an operator."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "routes.json"
        self.highest_term, self.generation = 0, 0
        self.routes = gateway_pb2.ApplyRoutesRequest()
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, DecodeError):  # the operator sends them again
            saved = json.loads(self.path.read_text())
            self.highest_term = int(saved["term"])
            self.routes = gateway_pb2.ApplyRoutesRequest.FromString(bytes.fromhex(saved["routes"]))
            self.generation = self.routes.generation

    def obey(self, request: gateway_pb2.ApplyRoutesRequest) -> None:
        self.highest_term, self.generation, self.routes = request.term, request.generation, request
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"term": request.term, "routes": request.SerializeToString().hex()}))
        os.replace(new, self.path)


class Gateway(gateway_pb2_grpc.GatewayServiceServicer, gateway_pb2_grpc.FrontServiceServicer):
    def __init__(
        self, gateway_id: str, state_dir: Path, fronts: Fronts, observe: Callable[[gateway_pb2.DemandReport], None] = lambda _: None
    ) -> None:
        self.observe = observe
        self.gateway_id, self.state, self.fronts = gateway_id, State(state_dir), fronts
        self.routes_changed = asyncio.Condition()
        self.watchers: list[deque[gateway_pb2.DemandReport]] = []

    async def Describe(self, request: gateway_pb2.DescribeRequest, context: Context) -> gateway_pb2.DescribeResponse:
        await require_role(context, "operator")
        return gateway_pb2.DescribeResponse(
            contract_version=CONTRACT_VERSION,
            gateway_id=self.gateway_id,
            highest_term=self.state.highest_term,
            routes_generation=self.state.generation,
        )

    async def ApplyRoutes(self, request: gateway_pb2.ApplyRoutesRequest, context: Context) -> gateway_pb2.ApplyRoutesResponse:
        await require_role(context, "operator")
        if request.contract_version != CONTRACT_VERSION:
            return self._rejected(Rejected.REASON_CONTRACT_VERSION, f"this gateway speaks contract {CONTRACT_VERSION}")
        if request.term < self.state.highest_term:
            return self._rejected(Rejected.REASON_STALE_TERM, f"term {request.term} is over")
        if request.term == self.state.highest_term and request.generation < self.state.generation:
            return self._rejected(Rejected.REASON_STALE_GENERATION, f"generation {self.state.generation} is in force")
        names = [p.model.name for p in request.pools]
        if len(set(names)) != len(names):
            return self._rejected(Rejected.REASON_INVALID, "pools: two pools serve a model of the same name")
        self.state.obey(request)
        await self.serve()
        return gateway_pb2.ApplyRoutesResponse(accepted=gateway_pb2.ApplyRoutesResponse.Accepted())

    async def serve(self) -> None:
        """The routes in force, to the fronts."""
        self.fronts.routed = bool(self.state.routes.contract_version)
        self.fronts.apply(list(self.state.routes.pools))
        async with self.routes_changed:
            self.routes_changed.notify_all()

    def _rejected(self, reason: "Rejected.Reason.ValueType", message: str) -> gateway_pb2.ApplyRoutesResponse:
        return gateway_pb2.ApplyRoutesResponse(rejected=Rejected(reason=reason, message=message, highest_term=self.state.highest_term))

    async def Watch(self, request: gateway_pb2.WatchRequest, context: Context) -> AsyncIterator[gateway_pb2.WatchResponse]:
        await require_role(context, "operator")
        interval_s = min(max(request.interval_ms or 1000, 100), 60_000) / 1e3
        if len(self.watchers) >= WATCHERS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS_MAX} callers watch already")
        windows: deque[gateway_pb2.DemandReport] = deque(maxlen=PENDING_MAX)
        self.watchers.append(windows)  # each has its own: a watcher that is about to vanish takes nothing from the next leader
        try:
            while True:
                await asyncio.sleep(interval_s)
                for report in [windows.popleft() for _ in range(len(windows))] or [gateway_pb2.DemandReport()]:
                    report.gateway_id = self.gateway_id
                    report.highest_term, report.routes_generation = self.state.highest_term, self.state.generation
                    yield gateway_pb2.WatchResponse(contract_version=CONTRACT_VERSION, report=report)
        finally:
            self.watchers = [w for w in self.watchers if w is not windows]

    async def Attach(
        self, request_iterator: AsyncIterator[gateway_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[gateway_pb2.AttachResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.HasField("hello"):
            return
        uid, name = first.hello.pool.uid, first.hello.pool.name
        reader = asyncio.create_task(self._collect(request_iterator))
        try:
            sent = b""
            while not reader.done():
                for route in self.state.routes.pools:
                    if (route.pool.uid, route.pool.name) == (uid, name) and (data := route.SerializeToString()) != sent:
                        sent = data
                        yield gateway_pb2.AttachResponse(route=route, generation=self.state.generation)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5), self.routes_changed:
                        await self.routes_changed.wait()
        finally:
            reader.cancel()

    async def _collect(self, frames: AsyncIterator[gateway_pb2.AttachRequest]) -> None:
        async for frame in frames:
            if frame.HasField("demand"):
                self.observe(frame.demand)
                for windows in self.watchers:
                    windows.append(gateway_pb2.DemandReport.FromString(frame.demand.SerializeToString()))
