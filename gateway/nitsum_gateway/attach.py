"""The router's line to its gateway process: demand goes up each second, routes come down and become lines to nodes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from nitsum_api import CONTRACT_VERSION
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_gateway.nodes import NodeLine
from nitsum_gateway.router import Router

log = logging.getLogger(__name__)

REPORT_S = 1.0


async def attach(router: Router, settings: dict[str, Any]) -> None:
    """Never returns. Keeps the last routes while the gateway process is away."""
    pool = types_pb2.PoolRef(name=settings["pool"], uid=settings["uid"])
    while True:
        try:
            async with grpc.aio.insecure_channel(f"unix:{settings['socket']}") as channel:
                call = gateway_pb2_grpc.FrontServiceStub(channel).Attach(_reports(router, pool))
                async for answer in call:
                    await apply(router, answer.route, settings)
        except grpc.aio.AioRpcError as error:
            log.warning("gateway: %s", error.details())
        await asyncio.sleep(0.5)


async def _reports(router: Router, pool: types_pb2.PoolRef) -> AsyncIterator[gateway_pb2.AttachRequest]:
    yield gateway_pb2.AttachRequest(hello=gateway_pb2.AttachRequest.Hello(pool=pool))
    last = time.monotonic()
    while True:
        await asyncio.sleep(REPORT_S)
        now = time.monotonic()
        report = router.demand.report(pool, [t.name for t in router.tiers], now - last, router.running())
        report.window_end.GetCurrentTime()
        last = now
        yield gateway_pb2.AttachRequest(demand=report)


async def apply(router: Router, route: gateway_pb2.PoolRoute, settings: dict[str, Any]) -> None:
    """Lines to nodes that are no longer named are closed; their streams go on elsewhere."""
    router.tiers, router.unready_reason = list(route.tiers), route.unready_reason
    hello = node_pb2.Hello(contract_version=CONTRACT_VERSION, gateway_id=settings["gateway_id"], pool=route.pool)
    wanted = {n.agent_id: n for n in route.nodes}
    gone = [
        router.lines.pop(agent)
        for agent, line in list(router.lines.items())
        if agent not in wanted or wanted[agent].address != line.address
    ]
    for agent, node in wanted.items():
        if agent in router.lines:
            router.lines[agent].apply(node)
        else:
            router.lines[agent] = NodeLine(node, hello, Path(settings["tls_dir"]), router.on_frame, router.on_break)
    for line in gone:
        await line.close()
