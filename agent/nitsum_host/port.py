"""The node data port: gateways attach, submit tokens, and get tokens back, one message per engine step."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from nitsum_api import CONTRACT_VERSION
from nitsum_api.node.v1 import node_pb2, node_pb2_grpc
from nitsum_api.security import require_role
from nitsum_host.node import Node

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
FRAMES_MAX = 8192
"""Frames that wait for a gateway; one that reads slower than this is cut off, and its requests with it."""


class Attached:
    """One gateway front, as the node sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.frames: asyncio.Queue[node_pb2.AttachResponse | None] = asyncio.Queue(FRAMES_MAX)
        self.overrun = False

    def send(self, frame: node_pb2.AttachResponse) -> None:
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.overrun = True

    def end(self) -> None:
        """No more frames will come from the gateway."""
        try:
            self.frames.put_nowait(None)
        except asyncio.QueueFull:
            self.overrun = True


class NodePort(node_pb2_grpc.NodeServiceServicer):
    def __init__(self, node: Node) -> None:
        self.node = node
        self._number = 0

    async def Attach(
        self, request_iterator: AsyncIterator[node_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[node_pb2.AttachResponse]:
        who = await require_role(context, "gateway")
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("frame") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the first frame must be Hello")
        assert first is not None
        if first.hello.contract_version != CONTRACT_VERSION:
            text = f"this node speaks contract {CONTRACT_VERSION}, the gateway {first.hello.contract_version or 'none'}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        self._number += 1
        session = Attached(self._number)
        self.node.sessions.add(session)
        log.info("gateway %s attached as %d", first.hello.gateway_id or who.name, session.number)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            yield node_pb2.AttachResponse(welcome=node_pb2.Welcome(contract_version=CONTRACT_VERSION))
            yield self.node.view()
            while not session.overrun and (frame := await session.frames.get()) is not None:
                yield frame
            if session.overrun:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the gateway left {FRAMES_MAX} frames unread")
        finally:
            reader.cancel()
            self.node.leave(session)

    async def _read(self, session: Attached, frames: AsyncIterator[node_pb2.AttachRequest]) -> None:
        try:
            async for frame in frames:
                kind = frame.WhichOneof("frame")
                if kind == "submit":
                    self.node.submit(session, frame.submit)
                elif kind == "abort":
                    self.node.abort(session, frame.abort.request_id)
        except grpc.aio.AioRpcError:
            pass
        session.end()
