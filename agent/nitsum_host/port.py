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
from nitsum_host import streams
from nitsum_host.node import Node

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
FRAMES_MAX = 8192
"""Frames that wait for a gateway; one that reads slower than this is cut off, and its requests with it."""
HELLO_S = 10.0
"""From the call to its first frame."""


class Attached:
    """One gateway front, as the node sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.frames: asyncio.Queue[node_pb2.AttachResponse | None] = asyncio.Queue(FRAMES_MAX)
        self.overrun = asyncio.Event()

    def send(self, frame: node_pb2.AttachResponse) -> None:
        self._put(frame)

    def end(self) -> None:
        """No more frames will come from the gateway."""
        self._put(None)

    def _put(self, frame: node_pb2.AttachResponse | None) -> None:
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.overrun.set()


class NodePort(node_pb2_grpc.NodeServiceServicer):
    def __init__(self, node: Node) -> None:
        self.node = node
        self._number = 0

    # grpc.aio takes a handler that writes by itself as well as a generator; the stub knows the latter only.
    async def Attach(self, request_iterator: AsyncIterator[node_pb2.AttachRequest], context: Context) -> None:  # type: ignore[override]
        who = await require_role(context, "gateway")
        try:
            first = await asyncio.wait_for(anext(aiter(request_iterator), None), HELLO_S)
        except TimeoutError:
            first = None
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
        writer = asyncio.create_task(self._write(session, context))
        overrun = asyncio.create_task(session.overrun.wait())
        try:
            await asyncio.wait((writer, overrun), return_when=asyncio.FIRST_COMPLETED)
        finally:  # at once, even where a write hangs on a gateway that does not read
            for task in (reader, writer, overrun):
                task.cancel()
            streams.leave(self.node, session)
            await asyncio.gather(reader, writer, overrun, return_exceptions=True)
            log.info("session %d ended", session.number)
        if session.overrun.is_set():
            text = f"the gateway left {FRAMES_MAX} frames unread"
            log.warning("session %d: %s", session.number, text)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    async def _write(self, session: Attached, context: Context) -> None:
        await context.write(node_pb2.AttachResponse(welcome=node_pb2.Welcome(contract_version=CONTRACT_VERSION)))
        await context.write(self.node.view())
        while (frame := await session.frames.get()) is not None:
            await context.write(frame)

    async def _read(self, session: Attached, frames: AsyncIterator[node_pb2.AttachRequest]) -> None:
        try:
            async for frame in frames:
                kind = frame.WhichOneof("frame")
                if kind == "submit":
                    streams.submit(self.node, session, frame.submit)
                elif kind == "abort":
                    streams.abort(self.node, session, frame.abort.request_id)
        except grpc.aio.AioRpcError:
            pass
        except Exception:  # a bug: the gateway must not go on writing to a node that does not read
            log.exception("session %d", session.number)
        session.end()
