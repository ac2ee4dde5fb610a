"""The whole system on one machine: a real control plane, the chart with its workloads off, and what the chart would run as pods
(operator, gateway, agents with their engine hosts) as local processes under the chart's identities and permissions.
"""

import asyncio
import contextlib
import fcntl
import json
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from kubernetes import client

from nitsum_local import existing
from nitsum_local.controlplane import ControlPlane, api_client
from nitsum_local.install import NAMESPACE, announce_agent, announce_gateway, create_node, install_chart, local_address, tls_folder
from nitsum_local.processes import Spec, Supervisor
from nitsum_sglang.testing.ports import free_ports

ROLES = ("agent", "host", "gateway")
SHARED_MEMORY = Path("/dev/shm")
_LEFT = "folders.json"
"""In the state folder: what lies outside of it. A stage that was killed could not remove it; the next one does."""


class StageBusy(RuntimeError):
    """Another stage lives in the same state folder."""


@dataclass(frozen=True)
class NodeSpec:
    """One agent and its engine host. `gpus`: declared slots."""

    name: str
    gpus: int


class Stage:
    """`async with Stage(...)`, then the steps in their order. Leaving stops every process and removes sockets and shared memory.

    `state_dir` keeps logs and kubeconfigs; sockets lie in a short folder of their own, since the kernel allows them 107 bytes.
    """

    def __init__(
        self, state_dir: Path, binaries: Mapping[str, Path], nodes: Sequence[NodeSpec], host_flags: Sequence[str] = (), restart: bool = True
    ) -> None:
        self.state_dir, self.binaries, self.nodes, self.restart = state_dir.resolve(), binaries, tuple(nodes), restart
        self.host_flags = tuple(host_flags)
        self.control_plane = ControlPlane(self.state_dir / "cluster", binaries)
        self.supervisor = Supervisor(self.state_dir / "log")
        self.address = local_address()
        self.gateway_port = free_ports(1)[0]
        self.gateway_control_port, *ports = free_ports(1 + 2 * len(self.nodes), self.address)
        self.node_ports = {n.name: (ports[2 * i], ports[2 * i + 1]) for i, n in enumerate(self.nodes)}
        """(agent, node data port) by node."""
        self.run_dir = Path()
        self.memory_dir = Path()
        self._api: Any = None
        self._lock: TextIO | None = None
        self._claimed = False

    async def __aenter__(self) -> "Stage":
        """Starts afresh: what an earlier stage left goes, its etcd included. Raises StageBusy."""
        self._take_lock()
        self._remove_left()
        for left in ("cluster", "chart", "tls", "gateway", "log"):
            shutil.rmtree(self.state_dir / left, ignore_errors=True)
        self.supervisor.logs.mkdir(parents=True, mode=0o700)
        self.run_dir = Path(tempfile.mkdtemp(prefix="nitsum-"))
        self.memory_dir = Path(tempfile.mkdtemp(prefix="nitsum-", dir=SHARED_MEMORY))
        self.supervisor.remove_at_end(self.run_dir, self.memory_dir)
        (self.state_dir / _LEFT).write_text(json.dumps([str(self.run_dir), str(self.memory_dir)]))
        return self

    def _take_lock(self) -> None:
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (self.state_dir / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise StageBusy(f"another one runs in {self.state_dir}: end it first (Ctrl-C in its terminal)") from e

    def _remove_left(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for folder in json.loads((self.state_dir / _LEFT).read_text()):
                if Path(folder).name.startswith("nitsum-"):
                    shutil.rmtree(folder, ignore_errors=True)

    async def __aexit__(self, *_: object) -> None:
        """Not stopped by cancellation: a second Ctrl-C does not leave processes behind."""
        task = asyncio.ensure_future(self._stop())
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(task)
        task.result()

    async def _stop(self) -> None:
        try:
            # Each is made to live without the others, so each can leave without them.
            await self.supervisor.stop_together(
                ["gateway", "operator", *(f"{n.name}.{part}" for n in self.nodes for part in ("agent", "host"))]
            )
            await self.supervisor.stop_all()
        finally:
            try:
                if self._claimed:
                    await existing.leave(self.control_plane.admin_kubeconfig, self.binaries["helm"], [n.name for n in self.nodes])
            finally:
                await self.control_plane.stop()
                if self._api is not None:
                    self._api.close()
                if self._lock is not None:
                    self._lock.close()

    @property
    def api(self) -> Any:
        """An administrator's `kubernetes.client.ApiClient`."""
        if self._api is None:
            self._api = api_client(self.control_plane.admin_kubeconfig)
        return self._api

    @property
    def tls(self) -> Path:
        return self.state_dir / "tls"

    @property
    def base_url(self) -> str:
        """Of the OpenAI endpoint, on loopback; its certificate names `localhost`."""
        return f"https://localhost:{self.gateway_port}"

    def ssl_context(self) -> ssl.SSLContext:
        """Trusts the release's CA."""
        return ssl.create_default_context(cafile=str(self.tls / "gateway/ca.crt"))

    async def start_control_plane(self) -> None:
        await self.control_plane.start()
        if self.control_plane.existing:
            await existing.claim(self.control_plane.admin_kubeconfig, [n.name for n in self.nodes])
            self._claimed = True

    @property
    def pools_namespace(self) -> str:
        return existing.POOLS_NAMESPACE if self.control_plane.existing else "default"

    async def install(self, values: Mapping[str, Any] | None = None) -> None:
        await install_chart(self.control_plane.admin_kubeconfig, self.binaries["helm"], self.state_dir / "chart", values)

    async def start_operator(self) -> None:
        """With the chart's configuration and its ServiceAccount's token. Returns when it has issued every role's certificate."""
        config = self.state_dir / "config.yaml"
        config.write_text(await asyncio.to_thread(self._config))
        kubeconfig = await asyncio.to_thread(self.control_plane.client_kubeconfig, "nitsum-operator", NAMESPACE)
        words = ["--namespace", NAMESPACE, "--kubeconfig", str(kubeconfig), "--config", str(config), "--health-port", "0"]
        await self._start("operator", "nitsum_operator.main", words)
        for role in ROLES:
            await tls_folder(self.api, f"nitsum-{role}-tls", self.tls / role, timeout_s=60)

    def _config(self) -> str:
        found = client.CoreV1Api(self.api).read_namespaced_config_map("nitsum-config", NAMESPACE, _request_timeout=10)
        return str(found.data["config.yaml"])

    async def start_nodes(self) -> None:
        await asyncio.gather(*(self._start_node(n) for n in self.nodes))

    async def _start_node(self, node: NodeSpec) -> None:
        agent_port, node_port = self.node_ports[node.name]
        folder, data = self.run_dir / node.name, f"{self.address}:{node_port}"
        folder.mkdir(mode=0o700, exist_ok=True)
        words = ["--listen", data, "--tls-dir", str(self.tls / "host"), "--socket", str(folder / "h.sock"), "--slots", str(node.gpus)]
        words += ["--state-dir", str(folder / "h"), "--memory-dir", str(self.memory_dir / node.name), "--node-name", node.name]
        words += ["--node-address", data, *self.host_flags]
        await self._start(f"{node.name}.host", "nitsum_host.main", words, (folder / "h.sock").exists)
        words = ["--listen", f"{self.address}:{agent_port}", "--tls-dir", str(self.tls / "agent"), "--host-socket", str(folder / "h.sock")]
        words += ["--state-dir", str(folder / "a"), "--agent-id", node.name, "--node-name", node.name, "--node-address", data]
        await self._start(f"{node.name}.agent", "nitsum_agent.main", words, lambda: _listens(self.address, agent_port))
        await asyncio.to_thread(create_node, self.api, node.name, node.gpus)
        await asyncio.to_thread(announce_agent, self.api, node.name, agent_port, node_port, self.address)

    async def start_gateway(self, name: str = "gateway-0") -> None:
        """Returns when it listens, and goes on importing SGLang: best started before the nodes, which import it too."""
        listen, control = f"127.0.0.1:{self.gateway_port}", f"{self.address}:{self.gateway_control_port}"
        words = ["--listen", listen, "--control-listen", control, "--tls-dir", str(self.tls / "gateway")]
        words += ["--state-dir", str(self.state_dir / "gateway"), "--gateway-id", name]
        await self._start("gateway", "nitsum_gateway.main", words, lambda: _listens("127.0.0.1", self.gateway_port))
        await asyncio.to_thread(announce_gateway, self.api, name, self.gateway_control_port, self.address)

    async def _start(self, name: str, module: str, words: list[str], ready: Callable[[], bool] | None = None) -> None:
        async def asks() -> bool:
            return await asyncio.to_thread(ready) if ready is not None else True

        tmp, faults = self.run_dir / "tmp", self.fault_dir(name)
        tmp.mkdir(mode=0o700, exist_ok=True)
        faults.mkdir(mode=0o700, parents=True, exist_ok=True)
        # TMPDIR: what a killed process leaves there goes with the stage.
        env = {"TMPDIR": str(tmp), "NITSUM_FAULT_DIR": str(faults)}
        # The deadline is longer than the processes' own, so that what they clean up is cleaned up.
        command = [sys.executable, "-m", module, *words]
        spec = Spec(name, command, env, ready=asks, ready_timeout_s=120, stop_deadline_s=30, restart=self.restart)
        await self.supervisor.start(spec)

    def fault_dir(self, name: str) -> Path:
        """A file `fault` in it, with the name of a FaultPoint, makes that process kill itself there."""
        return self.run_dir / "faults" / name

    def awake_lines(self) -> list[dict[str, Any]]:
        """Every engine's own record of when it was woken and parked: `t` (monotonic seconds), event, engine, gpus, pid. Sorted by time."""
        lines = [json.loads(line) for f in self.run_dir.glob("*/h/e/*/awake.jsonl") for line in f.read_text().splitlines()]
        return sorted(lines, key=lambda line: line["t"])


def _listens(address: str, port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex((address, port)) == 0


def pool_manifest(example: Path, model_path: Path) -> dict[str, Any]:
    """An example with the model's folder on this machine in place of the one on a node."""
    manifest: dict[str, Any] = yaml.safe_load(example.read_text())
    manifest["spec"]["model"]["source"] = {"path": str(model_path)}
    return manifest


async def wait_until(probe: Callable[[], Awaitable[bool]], what: str, timeout_s: float, poll_s: float = 0.25) -> None:
    """Raises TimeoutError that says what did not come."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not await probe():
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(poll_s)
