"""The fronts of a gateway: one process tree per pool, started when a route names the pool, ended when none does."""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_sglang.zygote_client import PRELOAD_FRONT, Child, Zygote, ZygoteEnded, log_tail

log = logging.getLogger(__name__)
START_S = 180.0
CONTEXT_LENGTH = 8192
RESTART_S = (0.5, 30.0)
PING_S, PING_TIMEOUT_S, PINGS_MAX = 10.0, 20.0, 3
"""A front that leaves so many pings in a row unanswered hangs: it is killed, and so started again."""
HEALTHY_S = 60.0
"""A front that served this long starts again at once."""
DEVICE = "cpu"
"""A front computes nothing."""


@dataclass
class Front:
    """`ready` is set while its HTTP server answers."""

    route: gateway_pb2.PoolRoute
    url: str
    api_key: str
    context_length: int
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    served: bool = False
    """Was ready once."""
    child: Child | None = None
    task: "asyncio.Task[None] | None" = None
    problem: str = ""


class Fronts:
    def __init__(self, state_dir: Path, tls_dir: Path, gateway_id: str, socket_path: Path) -> None:
        self.state_dir, self.tls_dir, self.gateway_id, self.socket_path = state_dir, tls_dir, gateway_id, socket_path
        self.by_model: dict[str, Front] = {}
        self.routed = False
        """Routes are known, be they none."""
        self.run_dir = socket_path.parent
        self.zygote: Zygote | None = None
        self._one = asyncio.Lock()

    def apply(self, pools: list[gateway_pb2.PoolRoute]) -> None:
        wanted = {p.model.name: p for p in pools}
        for model in [m for m, f in self.by_model.items() if m not in wanted or not _same(f.route, wanted[m])]:
            front = self.by_model.pop(model)
            if front.task:
                front.task.cancel()
        for model, route in wanted.items():
            if model in self.by_model:
                self.by_model[model].route = route
                continue
            source = route.model.source
            length = route.model.context_length or (_context_length(source.path) if source.path else 0)
            front = Front(route, "", secrets.token_urlsafe(32), length)
            front.task = asyncio.create_task(self._keep(front))
            self.by_model[model] = front

    async def _keep(self, front: Front) -> None:
        name = f"front-{front.route.pool.uid or front.route.model.name.replace('/', '_')}"
        args = {
            "model": front.route.model.name,
            "model_path": front.route.model.source.path or front.route.model.source.hugging_face.repo,
            "revision": front.route.model.source.hugging_face.revision,
            "pool": front.route.pool.name,
            "uid": front.route.pool.uid,
            "gateway_id": self.gateway_id,
            "tls_dir": str(self.tls_dir.resolve()),
            "socket": str(self.socket_path.resolve()),
            "api_key": front.api_key,
            "admin_api_key": secrets.token_urlsafe(32),
            "context_length": front.context_length,
            "device": DEVICE,
        }
        wait_s = RESTART_S[0]
        try:
            while True:
                began, log_path = time.monotonic(), self.state_dir / f"{name}.log"
                args["port"] = port = _free_port()  # a new one each time: another process may have taken the last
                front.url = f"http://127.0.0.1:{port}"
                try:
                    front.child = await (await self._warm()).fork(
                        "nitsum_gateway.front:run",
                        args,
                        log_path=log_path,
                        env={"TMPDIR": str(self.run_dir.resolve())},  # SGLang binds Unix sockets there, whose paths have 107 bytes at most
                        title=f"nitsum-front: {front.route.model.name}",
                    )
                    watcher = asyncio.create_task(self._watch(front, front.child))
                    try:
                        await asyncio.shield(front.child.exited)
                    finally:
                        watcher.cancel()
                    front.problem = f"the front ended and is started again; its log ends: {log_tail(log_path, 500)}"
                except (ZygoteEnded, ValueError, OSError) as error:
                    front.problem = f"the front did not start: {error}"
                front.ready.clear()
                wait_s = RESTART_S[0] if time.monotonic() - began > HEALTHY_S else min(wait_s * 2, RESTART_S[1])
                log.error("%s: %s", name, front.problem)
                await asyncio.sleep(wait_s)
        finally:
            front.ready.clear()
            if front.child is not None:
                await front.child.kill()

    async def prepare(self) -> None:
        """SGLang is imported before the first pool is there, whose front then starts in a second."""
        try:
            await self._warm()
        except (ZygoteEnded, OSError) as error:  # the first front tries again, and says so
            log.warning("the zygote did not start: %s", error)

    async def _warm(self) -> Zygote:
        """Started once, and again when it has died: SGLang is imported once for all fronts, which end with it."""
        async with self._one:
            if self.zygote is None or not self.zygote.alive:
                if self.zygote is not None:
                    await self.zygote.stop()
                self.zygote = Zygote(self.run_dir / "zygote.sock", self.state_dir / "zygote.log", DEVICE, PRELOAD_FRONT)
                await self.zygote.start()
            return self.zygote

    async def _watch(self, front: Front, child: Child) -> None:
        """Says when it is ready; ends one that never is, or that hangs."""
        began, missed = time.monotonic(), 0
        async with httpx.AsyncClient(timeout=PING_TIMEOUT_S) as client:
            while missed < PINGS_MAX and (front.ready.is_set() or time.monotonic() - began < START_S):
                if await _answers(client, front):
                    front.ready.set()
                    front.served, front.problem, missed = True, "", 0
                elif front.ready.is_set():
                    missed += 1
                await asyncio.sleep(PING_S if front.ready.is_set() else 0.2)
        log.error("the front of %s does not answer: it is ended", front.route.model.name)
        await child.kill()

    async def stop(self) -> None:
        tasks = [f.task for f in self.by_model.values() if f.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.zygote is not None:
            await self.zygote.stop()


async def _answers(client: httpx.AsyncClient, front: Front) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await client.get(front.url + "/v1/models", headers={"authorization": f"Bearer {front.api_key}"})).status_code == 200
    return False


def _same(a: gateway_pb2.PoolRoute, b: gateway_pb2.PoolRoute) -> bool:
    """What a front was started with: its tokenizer, template and context length come from the model."""

    def of(r: gateway_pb2.PoolRoute) -> tuple[object, ...]:
        return r.pool.uid, r.pool.name, r.model.name, r.model.source, r.model.context_length

    return of(a) == of(b)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _context_length(path: str) -> int:
    try:
        return int(json.loads(Path(path, "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError):
        return CONTEXT_LENGTH
