"""Installs the chart with the workloads off, and plays the kubelet's part for local processes: Secrets as folders, nodes, endpoints."""

import asyncio
import base64
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client

from nitsum_local.binaries import kubectl
from nitsum_local.certificates import write_private

CHART = Path(__file__).parents[2] / "charts/nitsum"
NAMESPACE = "nitsum-system"
CRDS = ("servingpools.nitsum.io", "servingnodes.nitsum.io")
_POLL_S = 0.2


def local_address() -> str:
    """This machine's own IPv4: the API server refuses loopback addresses in EndpointSlices. Listen on it alone; every hop is mTLS.

    Raises OSError where there is no network interface but loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # documentation range: chooses a route, sends nothing
            return str(s.getsockname()[0])
        except OSError as e:
            raise OSError("no IPv4 interface but loopback, and Kubernetes takes no loopback endpoints: see `make preflight`") from e


class InstallFailed(RuntimeError):
    """helm or kubectl refused; the message is theirs."""


async def run_command(*command: str, timeout_s: float) -> str:
    """Its standard output. Raises InstallFailed, TimeoutError."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HELM_")}  # HELM_KUBECONTEXT and its like name another cluster
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env)
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise InstallFailed(f"{Path(command[0]).name} {command[1]}: {err.decode(errors='replace')[-2000:]}")
    return out.decode(errors="replace")


async def install_chart(
    kubeconfig: Path, helm: Path, state_dir: Path, values: Mapping[str, Any] | None = None, chart: Path = CHART, namespace: str = NAMESPACE
) -> None:
    """Idempotent. Returns when the CRDs are Established; `values` goes over the chart's own, `workloads.enabled=false` over both."""
    file = _write_values(state_dir, values or {})
    home = [f"--repository-cache={state_dir / 'helm'}", f"--repository-config={state_dir / 'helm/repositories.yaml'}"]
    words = ["upgrade", "--install", "nitsum", str(chart), "--namespace", namespace, "--create-namespace", "--values", str(file), *home]
    await run_command(str(helm), *words, "--kubeconfig", str(kubeconfig), timeout_s=120)
    crds = [f"crd/{name}" for name in CRDS]
    condition = ["--for=condition=Established", "--timeout=30s"]
    await run_command(str(kubectl()), "wait", "--kubeconfig", str(kubeconfig), *condition, *crds, timeout_s=60)


async def tls_folder(api: Any, secret: str, folder: Path, namespace: str = NAMESPACE, timeout_s: float = 30.0) -> Path:
    """Writes ca.crt, tls.crt, tls.key of a Secret (mode 0600) once the operator has issued it. Raises TimeoutError naming it."""
    deadline_s = time.monotonic() + timeout_s
    while (data := await asyncio.to_thread(_secret, api, secret, namespace)) is None:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"Secret {namespace}/{secret} has no certificate after {timeout_s:g} s: see the operator's log")
        await asyncio.sleep(_POLL_S)
    return _write_folder(folder, data)


TAINT = {"key": "nitsum.io/no-kubelet", "effect": "NoSchedule"}
"""Not a cordon, which the operator heeds: a scheduler shall keep its pods away, for there is no kubelet."""
_KEYS = ("ca.crt", "tls.crt", "tls.key")


def _write_folder(folder: Path, data: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for key in _KEYS:
        write_private(folder / key, base64.b64decode(data[key]))
    return folder


def _write_values(state_dir: Path, values: Mapping[str, Any]) -> Path:
    state_dir.mkdir(parents=True, exist_ok=True)
    file = state_dir / "values.yaml"
    file.write_text(yaml.safe_dump({**values, "workloads": {"enabled": False}}))
    return file


def _secret(api: Any, name: str, namespace: str) -> dict[str, str] | None:
    try:
        data = client.CoreV1Api(api).read_namespaced_secret(name, namespace, _request_timeout=5).data or {}
    except client.ApiException as e:
        if e.status == 404:
            return None
        raise
    return data if all(data.get(k) for k in _KEYS) else None


def create_node(api: Any, name: str, gpus: int, labels: Mapping[str, str] | None = None) -> None:
    """A Node object, Ready, with `gpus` of the extended resource nitsum.io/gpu; one that is there is taken over. Blocks for some ms."""
    core = client.CoreV1Api(api)
    try:
        metadata = {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}}
        core.create_node({"metadata": metadata, "spec": {"taints": [TAINT]}}, _request_timeout=10)
    except client.ApiException as e:
        if e.status != 409:
            raise
    amount = {"nitsum.io/gpu": str(gpus)}
    ready = {"type": "Ready", "status": "True", "reason": "LocalProcess", "message": "nitsum runs here as local processes"}
    core.patch_node_status(name, {"status": {"capacity": amount, "allocatable": amount, "conditions": [ready]}}, _request_timeout=10)


def announce(api: Any, service: str, name: str, address: str, ports: Mapping[str, int], node: str = "", namespace: str = NAMESPACE) -> None:
    """One EndpointSlice for a process that is no pod; replaced if it is there. The API server refuses loopback IPs: see `local_address`."""
    slice_name = f"{service}-{name}"
    endpoint: dict[str, Any] = {"addresses": [address], "conditions": {"ready": True}}
    if node:
        endpoint["nodeName"] = node
    labels = {"kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "nitsum-local"}
    body = {
        "metadata": {"name": slice_name, "labels": labels},
        "addressType": "IPv4" if address.replace(".", "").isdigit() else "FQDN",
        "endpoints": [endpoint],
        "ports": [{"name": n, "port": p, "protocol": "TCP"} for n, p in ports.items()],
    }
    discovery = client.DiscoveryV1Api(api)
    try:
        discovery.delete_namespaced_endpoint_slice(slice_name, namespace, _request_timeout=10)
    except client.ApiException as e:
        if e.status != 404:
            raise
    discovery.create_namespaced_endpoint_slice(namespace, body, _request_timeout=10)


def announce_agent(api: Any, node: str, agent_port: int, node_port: int, address: str, namespace: str = NAMESPACE) -> None:
    announce(api, "nitsum-agents", node, address, {"agent": agent_port, "node": node_port}, node, namespace)


def announce_gateway(api: Any, name: str, port: int, address: str, namespace: str = NAMESPACE) -> None:
    announce(api, "nitsum-gateways", name, address, {"gateway": port}, "", namespace)
