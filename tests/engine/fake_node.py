"""A NodeService on a real port with mTLS. Its engine is a hash: the next token depends on all tokens before it, so a lost or a repeated
token changes all that follow."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import grpc.aio

from nitsum_api import CONTRACT_VERSION
from nitsum_api.node.v1 import node_pb2, node_pb2_grpc
from nitsum_api.security import require_role, server_credentials
from nitsum_api.types.v1 import types_pb2

Finish = node_pb2.Finish


def next_token(ids: list[int]) -> int:
    return 300 + zlib.crc32(repr(ids).encode()) % 600


@dataclass
class FakeNode(node_pb2_grpc.NodeServiceServicer):
    certs: Path
    group_id: str = "g-0"
    epoch: int = 1
    step_s: float = 0.005
    move_after: int = 0
    """Ends each stream as moved after this many of its tokens, to the successor `to`, once a stream; 0: never."""
    to: str = ""
    fail_after: int = 0
    """Ends each stream with an error that names its machine after this many of its tokens; 0: never."""
    refuse: Any = None
    """Refused reason for every submission after the first `refuse_after`."""
    refuse_after: int = 0
    longest: int = 0
    """Stops a stream after so many tokens; 0: never."""
    hold: bool = False
    """Takes submissions and says nothing more, as a long queue does."""
    attached: int = 0
    """Gateways on the line now."""
    submits: list[node_pb2.Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    port: int = 0
    started: ClassVar[list["FakeNode"]] = []

    async def start(self) -> "FakeNode":
        self.server = grpc.aio.server()
        node_pb2_grpc.add_NodeServiceServicer_to_server(self, self.server)
        self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", server_credentials(self.certs))
        await self.server.start()
        self.started.append(self)
        return self

    async def stop(self) -> None:
        await self.server.stop(0)

    def view(self) -> node_pb2.AttachResponse:
        ids = dict.fromkeys([self.group_id, *([self.to] if self.to else [])])
        groups = [node_pb2.NodeView.GroupView(group_id=i, epoch=self.epoch, state=types_pb2.GROUP_STATE_OPEN) for i in ids]
        return node_pb2.AttachResponse(view=node_pb2.NodeView(groups=groups))

    async def Attach(self, requests: AsyncIterator[node_pb2.AttachRequest], context: Any) -> AsyncIterator[node_pb2.AttachResponse]:  # type: ignore[override]
        await require_role(context, "gateway")
        out: asyncio.Queue[node_pb2.AttachResponse] = asyncio.Queue()
        running: dict[str, asyncio.Task[None]] = {}

        async def read() -> None:
            async for r in requests:
                if r.HasField("hello"):
                    out.put_nowait(node_pb2.AttachResponse(welcome=node_pb2.Welcome(contract_version=CONTRACT_VERSION)))
                    out.put_nowait(self.view())
                elif r.HasField("submit"):
                    self.submits.append(r.submit)
                    running[r.submit.request_id] = asyncio.create_task(self._generate(r.submit, out))
                elif r.HasField("abort") and r.abort.request_id in running:
                    self.aborted.append(r.abort.request_id)
                    running[r.abort.request_id].cancel()

        reader = asyncio.create_task(read())
        self.attached += 1
        try:
            while True:
                try:
                    yield await asyncio.wait_for(out.get(), 0.5)
                except TimeoutError:
                    yield self.view()
        finally:
            self.attached -= 1
            for t in (reader, *running.values()):
                t.cancel()

    async def _generate(self, s: node_pb2.Submit, out: "asyncio.Queue[node_pb2.AttachResponse]") -> None:
        if self.refuse is not None and len(self.submits) > self.refuse_after:
            refused = node_pb2.Refused(request_id=s.request_id, reason=self.refuse, message="as the test says", retry_after_ms=700)
            return out.put_nowait(node_pb2.AttachResponse(refused=refused))
        if self.hold and s.group_id == (self.to or self.group_id):
            await asyncio.sleep(600)
        ids, made = list(s.input_ids), 0
        while True:
            delta = node_pb2.TokenDelta(request_id=s.request_id, token_ids=[next_token(ids)], prompt_tokens=len(s.input_ids) - s.resume_k)
            ids.append(delta.token_ids[0])
            made += 1
            total = s.resume_k + made
            delta.completion_tokens = total
            if total >= s.sampling.max_new_tokens:
                delta.finish.kind = Finish.KIND_LENGTH
            elif self.longest and total >= self.longest:
                delta.finish.kind = Finish.KIND_STOP
            elif self.fail_after and total >= self.fail_after:
                text = 'File "/usr/lib/sglang/scheduler.py", line 7, on 10.0.0.3:7444'
                delta.finish.CopyFrom(Finish(kind=Finish.KIND_ERROR, status_code=500, message=text))
                del delta.token_ids[:]
            elif self.move_after and not s.resume_k and made == self.move_after:
                delta.finish.CopyFrom(
                    Finish(kind=Finish.KIND_MOVED, successors=[node_pb2.Successor(group_id=self.to or self.group_id, epoch=self.epoch)])
                )
                del delta.token_ids[:]  # as engines do: the tokens of the last chunk are made again elsewhere
            out.put_nowait(node_pb2.AttachResponse(tokens=node_pb2.TokenBatch(deltas=[delta])))
            if delta.HasField("finish"):
                return
            await asyncio.sleep(self.step_s)
