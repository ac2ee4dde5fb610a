"""Routes to gateways: to each when they differ from what it has, with a generation above all that it has seen."""

import asyncio
import logging
from collections.abc import Mapping

import grpc

from nitsum_api import CONTRACT_VERSION
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_operator.links import CALL_S, Link

log = logging.getLogger(__name__)


class Delivery:
    def __init__(self) -> None:
        self._sent: dict[str, tuple[int, bytes]] = {}
        """By address: generation and body of what the gateway took last."""
        self.stale_term = 0
        """Highest term that a gateway refused routes with."""

    async def send(self, links: Mapping[str, Link], wanted: list[gateway_pb2.PoolRoute], term: int) -> None:
        self._sent = {a: s for a, s in self._sent.items() if a in links}
        body = gateway_pb2.ApplyRoutesRequest(pools=wanted).SerializeToString(deterministic=True)
        known = [(a, link) for a, link in links.items() if link.described is not None]
        await asyncio.gather(*(self._send(a, link, wanted, body, term) for a, link in known))

    async def _send(self, address: str, link: Link, wanted: list[gateway_pb2.PoolRoute], body: bytes, term: int) -> None:
        generation, last = self._sent.get(address, (0, b""))
        reported = max(link.described.routes_generation, link.report.routes_generation if link.report else 0)
        lost = link.report is not None and generation > 0 and link.report.routes_generation == 0
        if last == body and not lost:
            return
        generation = max(generation, reported) + 1
        request = gateway_pb2.ApplyRoutesRequest(contract_version=CONTRACT_VERSION, term=term, generation=generation, pools=wanted)
        try:
            answer = await link.stub.ApplyRoutes(request, timeout=CALL_S)
        except grpc.aio.AioRpcError as e:
            log.warning("gateway %s did not take routes: %s %s", address, e.code().name, e.details())
            return
        if answer.WhichOneof("answer") == "rejected":
            log.warning("gateway %s rejected routes: %s", address, answer.rejected.message)
            self.stale_term = max(self.stale_term, answer.rejected.highest_term)
            self._sent[address] = (generation, b"")
        else:
            self._sent[address] = (generation, body)
