"""Hosts, agents and a gateway as real processes, with the test in the operator's place: the data plane without a Kubernetes."""

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import httpx
from google.protobuf.timestamp_pb2 import Timestamp

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity, secure_channel
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.testing.stock import free_port

POOL = types_pb2.PoolRef(name="default/chat", uid="u1")
TIERS = [
    types_pb2.Tier(name="interactive", ttft_ms=2000, tpot_ms=60, target=0.95, weight=4, is_default=True),
    types_pb2.Tier(name="agents", ttft_ms=10_000, tpot_ms=250, target=0.95, weight=1),
]


@dataclass
class Proc:
    name: str
    argv: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log, env={**env, **self.env}, start_new_session=True)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, sig)

    def stop(self, timeout_s: float = 15) -> None:
        if self.process is None:
            return
        self.kill(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)

    def tail(self) -> str:
        return f"--- {self.name}\n" + (self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "(no log)")


class Node:
    """One agent and its engine host."""

    def __init__(self, plane: "DataPlane", index: int, slots: int) -> None:
        self.name, self.plane, self.slots = f"node-{index}", plane, slots
        self.state = plane.folder / self.name
        self.state.mkdir()
        self.agent_port, self.node_port = free_port(), free_port()
        certs, socket = plane.folder / "certs", self.state / "host.sock"
        run = [sys.executable, "-m"]
        self.host = Proc(
            f"{self.name}/host",
            [
                *run,
                "nitsum_host.main",
                "--listen",
                f"127.0.0.1:{self.node_port}",
                "--tls-dir",
                f"{certs}/host",
                "--socket",
                str(socket),
                "--state-dir",
                str(self.state / "host"),
                "--memory-dir",
                str(plane.memory / self.name),
                "--slots",
                str(slots),
                "--node-name",
                self.name,
                "--node-address",
                f"127.0.0.1:{self.node_port}",
                "--max-total-tokens",
                "8192",
                *plane.host_flags,
            ],
            self.state / "host.log",
        )
        self.agent = Proc(
            f"{self.name}/agent",
            [
                *run,
                "nitsum_agent.main",
                "--listen",
                f"127.0.0.1:{self.agent_port}",
                "--tls-dir",
                f"{certs}/agent",
                "--host-socket",
                str(socket),
                "--state-dir",
                str(self.state / "agent"),
                "--agent-id",
                self.name,
                "--node-name",
                self.name,
                "--node-group",
                "g",
                "--node-address",
                f"127.0.0.1:{self.node_port}",
            ],
            self.state / "agent.log",
        )
        self.generation = 0
        self.gpus: list[str] = []

    @contextlib.asynccontextmanager
    async def stub(self):  # type: ignore[no-untyped-def]
        async with secure_channel(f"127.0.0.1:{self.agent_port}", "agent", self.plane.folder / "certs" / "operator") as channel:
            yield agent_pb2_grpc.AgentServiceStub(channel)

    async def describe(self, timeout_s: float = 90) -> agent_pb2.DescribeResponse:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                async with self.stub() as stub:
                    answer = await stub.Describe(agent_pb2.DescribeRequest(contract_version=CONTRACT_VERSION), timeout=5)
                    if len(answer.gpus) == self.slots:
                        self.gpus = [g.uuid for g in answer.gpus]
                        return answer
            except grpc.aio.AioRpcError:
                pass
            assert time.monotonic() < deadline, f"{self.name} does not describe itself\n{self.agent.tail()}\n{self.host.tail()}"
            await asyncio.sleep(0.2)

    def directive(self, tp_size: int, allowed: tuple[int, ...], model_path: Path, operation_id: str = "") -> agent_pb2.NodeDirective:
        self.generation += 1
        deadline = Timestamp()
        deadline.FromSeconds(int(time.time()) + 120)

        def blocks(tp: int) -> list[tuple[int, list[str]]]:
            return [(i, self.gpus[i : i + tp]) for i in range(0, self.slots - tp + 1, tp)]

        engines = [
            types_pb2.ResidentEngine(engine_id=f"chat-tp{tp}-{i}", model=self.plane.model, tp_size=tp, gpu_uuids=b)
            for tp in allowed
            for i, b in blocks(tp)
        ]
        shares = [types_pb2.TierShare(tier=t.name, share=0.5) for t in TIERS]
        groups = [
            types_pb2.Group(
                group_id=f"chat-tp{tp_size}-{i}",
                engine_id=f"chat-tp{tp_size}-{i}",
                pool=POOL,
                model=self.plane.model,
                tp_size=tp_size,
                gpu_uuids=b,
                role=types_pb2.ROLE_MIXED,
                shares=shares,
                capacity=types_pb2.Capacity(max_running=16, max_queued=64),
            )
            for i, b in blocks(tp_size)
        ]
        model = types_pb2.Model(name=self.plane.model, source=types_pb2.ModelSource(path=str(model_path)))
        return agent_pb2.NodeDirective(
            operation_id=operation_id or f"{self.name}-op{self.generation}",
            generation=self.generation,
            term=1,
            deadline=deadline,
            pools=[agent_pb2.PoolDirective(pool=POOL, model=model, tiers=TIERS)],
            residency=engines,
            layout=groups,
            mode=types_pb2.FLIP_MODE_ABORT,
        )

    async def apply(self, directive: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse:
        async with self.stub() as stub:
            return await stub.Apply(agent_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=directive), timeout=20)

    async def wait_applied(self, operation_id: str, timeout_s: float = 240) -> agent_pb2.NodeReport:
        """The report in which the directive is carried out and every group of the node is open."""
        last = None
        try:
            async with asyncio.timeout(timeout_s), self.stub() as stub:
                async for answer in stub.Watch(agent_pb2.WatchRequest(contract_version=CONTRACT_VERSION, interval_ms=200)):
                    last = answer.report
                    is_open = all(g.state == types_pb2.GROUP_STATE_OPEN for g in last.groups)
                    if last.applied_operation_id == operation_id and not last.in_progress_operation_id and last.groups and is_open:
                        return last
        except TimeoutError:
            pass
        raise AssertionError(
            f"{operation_id} not applied after {timeout_s:g} s; last report: {last}\n{self.agent.tail()}\n{self.host.tail()}"
        )


class DataPlane:
    """Ends every process and removes the shared memory when it closes."""

    def __init__(
        self, folder: Path, model: str, model_path: Path, slots: tuple[int, ...], host_flags: tuple[str, ...] = ("--no-weight-store",)
    ) -> None:
        self.folder, self.model, self.model_path, self.host_flags = folder, model, model_path, host_flags
        self.memory = Path("/dev/shm") / f"nitsum-test-{os.getpid()}-{free_port()}"
        self.memory.mkdir(mode=0o700)
        ca = new_ca()
        for role in ("operator", "agent", "host", "gateway"):
            d = folder / "certs" / role
            d.mkdir(parents=True)
            for name, data in issue(ca, Identity(role, "test"), ("localhost",)).items():
                (d / name).write_bytes(data)
                (d / name).chmod(0o600)
        self.nodes = [Node(self, i, n) for i, n in enumerate(slots)]
        self.port, self.control_port = free_port(), free_port()
        self.gateway = Proc(
            "gateway",
            [
                sys.executable,
                "-m",
                "nitsum_gateway.main",
                "--listen",
                f"127.0.0.1:{self.port}",
                "--control-listen",
                f"127.0.0.1:{self.control_port}",
                "--tls-dir",
                f"{folder}/certs/gateway",
                "--state-dir",
                f"{folder}/gateway",
                "--gateway-id",
                "gw-0",
            ],
            folder / "gateway.log",
        )
        (folder / "gateway").mkdir()
        self.routes_generation = 0

    @property
    def procs(self) -> list[Proc]:
        return [p for n in self.nodes for p in (n.host, n.agent)] + [self.gateway]

    def start(self) -> None:
        for p in self.procs:
            p.start()

    def stop(self) -> None:
        for p in reversed(self.procs):
            p.stop()
        import shutil

        shutil.rmtree(self.memory, ignore_errors=True)

    def logs(self) -> str:
        return "\n".join(p.tail() for p in self.procs)

    def client(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.folder / "certs" / "gateway" / "ca.crt"))
        return httpx.AsyncClient(base_url=f"https://localhost:{self.port}", verify=context, timeout=60)

    async def apply_routes(self, reports: list[agent_pb2.NodeReport]) -> gateway_pb2.ApplyRoutesResponse:
        """What the operator does: groups and epochs as the agents report them."""
        self.routes_generation += 1
        nodes = [
            gateway_pb2.NodeRoute(
                address=f"127.0.0.1:{n.node_port}", tls_name="host.nitsum.internal", agent_id=n.name, groups=[g.group for g in r.groups]
            )
            for n, r in zip(self.nodes, reports, strict=True)
        ]
        model = types_pb2.Model(name=self.model, source=types_pb2.ModelSource(path=str(self.model_path)))
        pool = gateway_pb2.PoolRoute(pool=POOL, model=model, tiers=TIERS, nodes=nodes)
        request = gateway_pb2.ApplyRoutesRequest(contract_version=CONTRACT_VERSION, term=1, generation=self.routes_generation, pools=[pool])
        async with secure_channel(f"127.0.0.1:{self.control_port}", "gateway", self.folder / "certs" / "operator") as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            return await stub.ApplyRoutes(request, timeout=60, wait_for_ready=True)

    async def wait_serving(self, timeout_s: float = 120) -> None:
        """Until one short completion comes back."""
        deadline = time.monotonic() + timeout_s
        last = ""
        async with self.client() as client:
            while time.monotonic() < deadline:
                try:
                    r = await client.post(
                        "/v1/completions", json={"model": self.model, "prompt": "hello", "max_tokens": 2, "temperature": 0}
                    )
                    last = f"{r.status_code} {r.text[:300]}"
                    if r.status_code == 200:
                        return
                except httpx.HTTPError as e:
                    last = repr(e)
                await asyncio.sleep(0.5)
        raise AssertionError(f"the gateway does not serve: {last}\n{self.logs()}")
