"""The embedded control plane is a real one, and leaves nothing."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from nitsum_local import existing, install
from nitsum_local.controlplane import ControlPlane, api_client, use_existing
from nitsum_local.stage import NodeSpec, Stage


def test_the_server_answers_with_its_version(kubectl: Callable[..., str]) -> None:
    assert '"gitVersion": "v1.37' in kubectl("get", "--raw", "/version")


def test_an_account_without_rights_is_refused(control_plane: ControlPlane) -> None:
    path = control_plane.client_kubeconfig("default", "default")
    assert path.stat().st_mode & 0o77 == 0
    with api_client(path) as api, pytest.raises(client.ApiException) as refused:
        client.CoreV1Api(api).list_namespaced_secret("default")
    assert refused.value.status == 403
    assert "system:serviceaccount:default:default" in refused.value.body


def test_nodes_and_endpoints_of_local_processes(installed: ControlPlane, admin: Any) -> None:
    install.create_node(admin, "local-a", 2, {"example": "yes"})
    address = install.local_address()
    install.announce_agent(admin, "local-a", 7001, 7002, address)
    with api_client(installed.client_kubeconfig("nitsum-operator", install.NAMESPACE)) as operator:
        found = client.DiscoveryV1Api(operator).list_namespaced_endpoint_slice(install.NAMESPACE).items
        assert [(e.node_name, e.addresses) for s in found for e in s.endpoints] == [("local-a", [address])]
        found = {n.metadata.name: n for n in client.CoreV1Api(operator).list_node().items}
        assert found["local-a"].status.capacity["nitsum.io/gpu"] == "2"


async def test_a_cluster_that_has_nitsum_is_not_taken_over(installed: ControlPlane, admin: Any) -> None:
    before = {n.metadata.name for n in client.CoreV1Api(admin).list_namespace().items}
    with pytest.raises(existing.NotOurs, match=r"crd/servingpools\.nitsum\.io.*kubectl delete"):
        await existing.claim(installed.admin_kubeconfig)
    assert {n.metadata.name for n in client.CoreV1Api(admin).list_namespace().items} == before


async def borrow(kubeconfig: Path, state: Path, binaries: dict[str, Path]) -> set[str]:
    """Installs into a cluster that exists and leaves; what was there between."""
    async with Stage(state, binaries, [NodeSpec("borrowed-0", 1)]) as stage:
        await stage.start_control_plane()
        await stage.install()
        await asyncio.to_thread(install.create_node, stage.api, "borrowed-0", 1)
        assert stage.control_plane.supervisor is None
        return everything(kubeconfig)


def everything(kubeconfig: Path) -> set[str]:
    """Cluster-scoped objects that an installation makes."""
    with api_client(kubeconfig) as api:
        core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
        crds = client.ApiextensionsV1Api(api).list_custom_resource_definition().items
        items = [*core.list_namespace().items, *core.list_node().items, *crds, *rbac.list_cluster_role().items]
        return {i.metadata.name for i in [*items, *rbac.list_cluster_role_binding().items]}


def test_stop_leaves_no_process(
    binaries: dict[str, Path],
    submit: Callable[[Coroutine[Any, Any, Any]], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not use_existing(), "unset USE_EXISTING_CLUSTER: this test starts and stops a control plane"
    plane = ControlPlane(tmp_path / "state", binaries)
    submit(plane.start())
    # In between it is a cluster that exists: nitsum comes in, and leaves nothing and nobody.
    monkeypatch.setenv("USE_EXISTING_CLUSTER", "true")
    monkeypatch.setenv("KUBECONFIG", str(plane.admin_kubeconfig))
    before = everything(plane.admin_kubeconfig)
    between = submit(borrow(plane.admin_kubeconfig, tmp_path / "state/stage", binaries))
    assert {"servingpools.nitsum.io", "nitsum-system", "nitsum-system-pools", "borrowed-0"} <= between
    left = everything(plane.admin_kubeconfig) - before
    assert not {name for name in left if "nitsum" in name or "borrowed" in name}
    submit(plane.stop())
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    lines = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                lines.append((process / "cmdline").read_bytes())
            except OSError:
                continue
    assert not [line for line in lines if str(tmp_path).encode() in line]
