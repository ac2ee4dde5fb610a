"""Lines from a router to the node data ports of its pool: one stream each, dialled again when it breaks. Imports gRPC: routers only."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio

from nitsum.layout import Role
from nitsum.routing import GroupView
from nitsum_api import CONTRACT_VERSION
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.node.v1 import node_pb2, node_pb2_grpc
from nitsum_api.security import secure_channel
from nitsum_api.types.v1 import types_pb2

log = logging.getLogger(__name__)

OUTBOX_MAX = 16384
"""Frames that wait for a node that reads too slowly; past it the line counts as broken."""
REDIAL_S = (0.1, 2.0)
SILENCE_S = 15.0
"""A node says something at least each second: after this long the line counts as broken."""
LEARNED_MAX = 64
DOWN_S = 10.0
"""A line that is down for so long is not expected back soon."""
ROLES = {types_pb2.ROLE_PREFILL: Role.PREFILL, types_pb2.ROLE_DECODE: Role.DECODE}
Key = tuple[str, str]


class NodeLine:
    """`on_frame(line, frame)` gets what the node says; `on_break(line)` is called once for each line that was up and broke."""

    def __init__(
        self,
        route: gateway_pb2.NodeRoute,
        hello: node_pb2.Hello,
        tls_dir: Path,
        on_frame: Callable[["NodeLine", node_pb2.AttachResponse], None],
        on_break: Callable[["NodeLine"], None],
    ) -> None:
        self.agent_id, self.address, self.hello, self.tls_dir = route.agent_id, route.address, hello, tls_dir
        self.on_frame, self.on_break = on_frame, on_break
        self.routed: dict[str, types_pb2.Group] = {}
        self.learned: dict[str, int] = {}
        """Successors that the node named: of our pool, though our routes do not have them yet. Group id to epoch."""
        self.view: dict[str, node_pb2.NodeView.GroupView] = {}
        self.sent: dict[str, int] = {}
        """Submissions since the last view, by group: it does not count them yet."""
        self.outbox: asyncio.Queue[node_pb2.AttachRequest] | None = None
        self.changes = 0
        """Counts what `groups` may show anew, what was sent apart."""
        self.problem = "not connected yet"
        self._down_at = time.monotonic()
        self.apply(route)
        self.task = asyncio.create_task(self._run())

    def apply(self, route: gateway_pb2.NodeRoute) -> None:
        self.changes += 1
        self.routed = {g.group_id: g for g in route.groups if g.pool.name == self.hello.pool.name}

    def learn(self, successors: list[node_pb2.Successor]) -> None:
        for s in successors:
            self.learned.pop(s.group_id, None)
            self.learned[s.group_id] = s.epoch
        while len(self.learned) > LEARNED_MAX:
            self.learned.pop(next(iter(self.learned)))
        self.changes += 1

    def send(self, frame: node_pb2.AttachRequest) -> bool:
        """False: the line is down."""
        if self.outbox is None or self.outbox.full():
            return False
        self.outbox.put_nowait(frame)
        if frame.HasField("submit"):
            self.sent[frame.submit.group_id] = self.sent.get(frame.submit.group_id, 0) + 1
        return True

    @property
    def gone(self) -> bool:
        """Not worth waiting for."""
        return self.outbox is None and time.monotonic() - self._down_at > DOWN_S

    def groups(self) -> list[GroupView]:
        if self.outbox is None or (not self.view and not self.routed):
            return []
        return [self._group(i) for i in dict.fromkeys([*self.routed, *(i for i in self.learned if i in self.view)])]

    def _group(self, group_id: str) -> GroupView:
        routed, seen = self.routed.get(group_id), self.view.get(group_id)
        tiers = frozenset(s.tier for s in routed.shares if s.share > 0 or s.max_running) if routed else frozenset[str]()
        role = ROLES.get(routed.role, Role.MIXED) if routed else Role.MIXED
        sent = self.sent.get(group_id, 0)
        if seen is None:
            assert routed is not None
            return GroupView((self.agent_id, group_id), routed.epoch, True, tiers, sent, hint=bool(self.view), role=role)
        up = seen.state in (types_pb2.GROUP_STATE_OPEN, types_pb2.GROUP_STATE_OPENING)
        load = seen.load
        queued = load.queued_feasible + load.queued_best_effort + load.queued_background
        closing = seen.state == types_pb2.GROUP_STATE_CLOSING
        return GroupView(
            (self.agent_id, group_id),
            seen.epoch,
            up or closing,
            tiers,
            load.running + sent,
            queued,
            seen.capacity.max_running,
            closing,
            role,
        )

    async def _run(self) -> None:
        wait_s, said = REDIAL_S[0], ""
        while True:
            was_up = False
            try:
                async with secure_channel(self.address, "host", self.tls_dir) as channel:
                    was_up = await self._attach(channel)
            except (grpc.aio.AioRpcError, OSError, TimeoutError) as error:
                self.problem = error.details() or "" if isinstance(error, grpc.aio.AioRpcError) else str(error) or type(error).__name__
                was_up = self.outbox is not None
            if was_up:
                wait_s = REDIAL_S[0]
                self._down()
            if was_up or self.problem != said:  # one that stays away is dialled for as long as it is routed to
                log.warning("node %s at %s: %s", self.agent_id, self.address, self.problem)
            said = self.problem
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
            wait_s = min(wait_s * 2, REDIAL_S[1])

    def _down(self) -> None:
        self.outbox, self.view, self.sent, self._down_at = None, {}, {}, time.monotonic()
        self.changes += 1
        self.on_break(self)

    async def _attach(self, channel: grpc.aio.Channel) -> bool:
        """Until the node ends the stream. True if it had accepted us."""
        outbox: asyncio.Queue[node_pb2.AttachRequest] = asyncio.Queue(OUTBOX_MAX)
        outbox.put_nowait(node_pb2.AttachRequest(hello=self.hello))

        async def frames() -> AsyncIterator[node_pb2.AttachRequest]:
            while True:
                yield await outbox.get()

        call = node_pb2_grpc.NodeServiceStub(channel).Attach(frames())
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    read = await call.read()
                if read is grpc.aio.EOF:
                    break
                assert isinstance(read, node_pb2.AttachResponse)
                frame = read
                what = frame.WhichOneof("frame")
                if what == "welcome":
                    if frame.welcome.contract_version != CONTRACT_VERSION:
                        self.problem = f"speaks contract {frame.welcome.contract_version}, this gateway {CONTRACT_VERSION}"
                        return False
                    self.outbox, self.problem = outbox, ""
                    self.changes += 1
                elif what == "view":
                    self.view, self.sent = {g.group_id: g for g in frame.view.groups}, {}
                    self.outbox = self.outbox or outbox
                    self.changes += 1
                elif what is not None:
                    self.on_frame(self, frame)
            status = await call.code()
            self.problem = f"ended the stream: {status.name} {await call.details()}"
        finally:
            call.cancel()
        return self.outbox is not None

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        if self.outbox is not None:
            self._down()
