"""A cluster that exists (USE_EXISTING_CLUSTER=true): nitsum comes in namespaces and CRDs of its own, or not at all, and leaves."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kubernetes import client

from nitsum_local.binaries import kubectl
from nitsum_local.controlplane import api_client
from nitsum_local.install import CRDS, NAMESPACE, run_command

POOLS_NAMESPACE = f"{NAMESPACE}-pools"
_WAIT_S = 180


class NotOurs(RuntimeError):
    """Something is there that we would take over; the message names it and the remedy."""


def _there(read: Any, *words: str) -> bool:
    try:
        read(*words, _request_timeout=10)
    except client.ApiException as e:
        if e.status == 404:
            return False
        raise
    return True


def _claim(kubeconfig: Path, nodes: Collection[str]) -> None:
    with api_client(kubeconfig) as api:
        core, crds = client.CoreV1Api(api), client.ApiextensionsV1Api(api)
        found = [f"crd/{name}" for name in CRDS if _there(crds.read_custom_resource_definition, name)]
        found += [f"namespace/{name}" for name in (NAMESPACE, POOLS_NAMESPACE) if _there(core.read_namespace, name)]
        found += [f"node/{name}" for name in nodes if _there(core.read_node, name)]
        if found:
            words = f"{', '.join(found)} is in the cluster of {kubeconfig} already, and is not taken over"
            raise NotOurs(f"{words}: remove it (kubectl delete {' '.join(found)}), or unset USE_EXISTING_CLUSTER")
        core.create_namespace({"metadata": {"name": POOLS_NAMESPACE}}, _request_timeout=10)


async def claim(kubeconfig: Path, nodes: Collection[str] = ()) -> None:
    """Before anything is installed. Raises NotOurs; then nothing was changed."""
    await asyncio.to_thread(_claim, kubeconfig, nodes)


async def leave(kubeconfig: Path, helm: Path, nodes: Collection[str] = ()) -> None:
    """All that was installed goes, pools first. Only after a `claim` that was granted."""
    ctl = [str(kubectl()), "--kubeconfig", str(kubeconfig)]
    delete = [*ctl, "delete", "--ignore-not-found", f"--timeout={_WAIT_S}s"]
    await run_command(*delete, *(f"crd/{name}" for name in CRDS), timeout_s=_WAIT_S + 10)
    if nodes:
        await run_command(*delete, *(f"node/{name}" for name in nodes), timeout_s=_WAIT_S + 10)
    words = ["uninstall", "nitsum", "--namespace", NAMESPACE, "--ignore-not-found", "--kubeconfig", str(kubeconfig)]
    await run_command(str(helm), *words, timeout_s=120)
    await run_command(*delete, f"namespace/{NAMESPACE}", f"namespace/{POOLS_NAMESPACE}", timeout_s=_WAIT_S + 10)
