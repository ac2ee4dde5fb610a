"""The embedded control plane is a real one, and leaves nothing."""

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from nitsum_local import install
from nitsum_local.controlplane import ControlPlane, api_client, use_existing


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


def test_stop_leaves_no_process(binaries: dict[str, Path], submit: Callable[[Coroutine[Any, Any, Any]], Any], tmp_path: Path) -> None:
    assert not use_existing(), "unset USE_EXISTING_CLUSTER: this test starts and stops a control plane"
    plane = ControlPlane(tmp_path / "state", binaries)
    submit(plane.start())
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
