"""A gateway, an agent and an engine host as they run in a cluster: own processes, mTLS on every hop, no control plane. Whoever starts them
is their operator, and says by hand which engines are awake in which role.
"""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity, dns_name, secure_channel
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.testing.ports import free_ports

MODEL, NODE = "tiny-llama", "bench"
MIXED, PREFILL, DECODE = types_pb2.ROLE_MIXED, types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE
POOL = types_pb2.PoolRef(name="default/tiny", uid="u")
GPUS = [f"{NODE}-slot-{i}" for i in range(2)]
TIERS = [types_pb2.Tier(name="interactive", ttft_ms=60_000, tpot_ms=10_000, is_default=True)]


ENGINES = {"e1": GPUS[:1], "e2": GPUS}


class Node:
    """`async with`; then `flip_to` any TP or `wake` engines in roles, and `http()` as any user of the gateway.

    `engines`: resident ones, with their GPUs; the first is awake at the start. `folder` is short: sockets lie in it.
    """

    def __init__(self, folder: Path, model: Path, engines: dict[str, list[str]] = ENGINES) -> None:
        self.folder, self.model, self.engines, self.generation = folder, model, engines, 0
        self.ports = dict(zip(("listen", "control", "agent", "data"), free_ports(4), strict=True))
        self.memory_dir = Path("/dev/shm") / f"nitsum-b{os.getpid()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    async def __aenter__(self) -> "Node":
        ca = new_ca()
        for role in ("operator", "agent", "host", "gateway"):
            (self.folder / role).mkdir()
            for name, data in issue(ca, Identity(role, "bench"), ("localhost",)).items():
                (self.folder / role / name).write_bytes(data)
        f, address = self.folder, {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        host = f"--listen {address['data']} --tls-dir {f}/host --socket {f}/h.sock --state-dir {f}/h --memory-dir {self.memory_dir}"
        agent = f"--listen {address['agent']} --tls-dir {f}/agent --host-socket {f}/h.sock --state-dir {f}/a --agent-id {NODE}"
        gateway = f"--listen {address['listen']} --control-listen {address['control']} --tls-dir {f}/gateway --state-dir {f}/g"
        self._start("host", "nitsum_host.main", f"{host} --slots {len(GPUS)} --node-name {NODE}")
        self._start("agent", "nitsum_agent.main", f"{agent} --node-name {NODE} --node-address {address['data']}")
        self._start("gateway", "nitsum_gateway.main", f"{gateway} --gateway-id gateway-0")
        try:
            await self.wake({next(iter(self.engines)): MIXED})
            await self._serves()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(self.memory_dir, ignore_errors=True)

    def _start(self, name: str, module: str, words: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *words.split()], stdout=log, stderr=log, start_new_session=True
            )

    def logs(self) -> str:
        return "".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(self.folder.glob("*.log")))

    async def flip_to(self, tp_size: int) -> agent_pb2.NodeReport:
        return await self.wake({next(i for i, gpus in self.engines.items() if len(gpus) == tp_size): MIXED})

    async def wake(self, roles: "dict[str, types_pb2.Role.ValueType]") -> agent_pb2.NodeReport:
        """Engines by id. As the operator does it: a directive, its end, and the routes that follow from it."""
        self.generation += 1
        directive = self._directive(roles)
        async with secure_channel(f"127.0.0.1:{self.ports['agent']}", "agent", self.folder / "operator") as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            apply = agent_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=directive)
            async with asyncio.timeout(180):
                # A host that is still starting is no host yet.
                while (answer := await stub.Apply(apply, timeout=60, wait_for_ready=True)).WhichOneof("answer") == "rejected":
                    if answer.rejected.reason != agent_pb2.ApplyResponse.Rejected.REASON_HOST_UNAVAILABLE:
                        raise RuntimeError(f"the agent refuses: {answer.rejected.message}\n{self.logs()}")
                    await asyncio.sleep(0.2)
                watch = agent_pb2.WatchRequest(contract_version=CONTRACT_VERSION, interval_ms=100)
                async for seen in stub.Watch(watch):
                    if seen.report.applied_operation_id == directive.operation_id:
                        break
                    if seen.report.problem:
                        raise RuntimeError(f"{seen.report.problem}\n{self.logs()}")
        await self._route([g.group for g in seen.report.groups])
        return seen.report

    def _directive(self, roles: "dict[str, types_pb2.Role.ValueType]") -> agent_pb2.NodeDirective:
        model = types_pb2.Model(name=MODEL, source=types_pb2.ModelSource(path=str(self.model)))
        groups = [
            types_pb2.Group(group_id=f"g-{i}", engine_id=i, pool=POOL, model=MODEL, tp_size=len(gpus), gpu_uuids=gpus, role=roles[i])
            for i, gpus in self.engines.items()
            if i in roles
        ]
        return agent_pb2.NodeDirective(
            operation_id=f"op-{self.generation}",
            generation=self.generation,
            term=1,
            pools=[agent_pb2.PoolDirective(pool=POOL, model=model, tiers=TIERS)],
            residency=[
                types_pb2.ResidentEngine(engine_id=i, model=MODEL, tp_size=len(gpus), gpu_uuids=gpus) for i, gpus in self.engines.items()
            ],
            layout=groups,
            mode=types_pb2.FLIP_MODE_ABORT,
        )

    async def _route(self, groups: list[types_pb2.Group]) -> None:
        address, name = f"127.0.0.1:{self.ports['data']}", dns_name("host")
        node = gateway_pb2.NodeRoute(address=address, tls_name=name, agent_id=NODE, groups=groups)
        model = types_pb2.Model(name=MODEL, source=types_pb2.ModelSource(path=str(self.model)))
        route = gateway_pb2.PoolRoute(pool=POOL, model=model, tiers=TIERS, nodes=[node])
        request = gateway_pb2.ApplyRoutesRequest(contract_version=CONTRACT_VERSION, term=1, generation=self.generation, pools=[route])
        async with secure_channel(f"127.0.0.1:{self.ports['control']}", "gateway", self.folder / "operator") as channel:
            answer = await gateway_pb2_grpc.GatewayServiceStub(channel).ApplyRoutes(request, timeout=60, wait_for_ready=True)
        if not answer.HasField("accepted"):
            raise RuntimeError(f"the gateway refuses: {answer.rejected.message}")

    def http(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.folder / "gateway/ca.crt"))
        return httpx.AsyncClient(verify=context, base_url=self.base_url.removesuffix("/v1"), timeout=120)

    @property
    def base_url(self) -> str:
        return f"https://localhost:{self.ports['listen']}/v1"

    async def _serves(self) -> None:
        deadline = time.monotonic() + 180
        async with self.http() as client:
            while True:
                try:
                    answer = await client.post(f"{self.base_url}/completions", json={"model": MODEL, "prompt": "hi", "max_tokens": 2})
                    if answer.status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the gateway does not serve\n{self.logs()}")
                await asyncio.sleep(0.3)

    def pids(self) -> dict[str, int]:
        return {name: p.pid for name, p in self.processes.items()}

    def awake_lines(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for f in self.folder.glob("h/e/*/awake.jsonl") for line in f.read_text().splitlines()]
        return sorted(lines, key=lambda line: line["t"])
