"""The chart installs into a real API server, with and without workloads; no pod runs here, but every object is admitted.

CRDs are those of the release that `installed` made; `TEST_KUBECONFIG` names another server instead, which then gets them.
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nitsum_local.controlplane import ControlPlane
from nitsum_local.install import install_chart

ROOT = Path(__file__).parents[2]
CHART, NAMESPACE, RELEASE = ROOT / "charts/nitsum", "test-chart", "charttest"
Run = Callable[..., str]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    own = os.environ.get("TEST_KUBECONFIG")
    if own is None:
        request.getfixturevalue("installed")
    kubeconfig = own or str(request.getfixturevalue("admin_kubeconfig"))
    tools = {"kubectl": "kubectl"}
    try:
        from nitsum_local.binaries import ensure

        tools["helm"] = str(ensure(("helm",))["helm"])
    except ImportError:
        tools["helm"] = shutil.which("helm", path=f"{os.environ.get('KUBEBUILDER_ASSETS', '')}:{os.environ['PATH']}") or "helm"

    def command(tool: str, *args: str) -> str:
        words = [tools[tool], "--kubeconfig", kubeconfig, "--namespace", NAMESPACE, *args]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(args)}: {done.stderr}"
        return done.stdout

    command("kubectl", "create", "namespace", NAMESPACE)
    if own is not None:
        command("kubectl", "apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    yield command
    subprocess.run([tools["helm"], "--kubeconfig", kubeconfig, "-n", NAMESPACE, "uninstall", RELEASE], capture_output=True, timeout=60)
    command("kubectl", "delete", "namespace", NAMESPACE, "--wait=true")


def install(run: Run, *flags: str) -> None:
    run("helm", "upgrade", "--install", RELEASE, str(CHART), "--reset-values", "--set", "crds.install=false", *flags)


def names(run: Run, kind: str) -> set[str]:
    items: list[dict[str, Any]] = json.loads(run("kubectl", "get", kind, "-o", "json"))["items"]
    return {i["metadata"]["name"] for i in items}


def test_install_without_workloads_then_with_then_without(run: Run) -> None:
    install(run, "--set", "workloads.enabled=false")
    assert {"nitsum-agents", "nitsum-gateways", "nitsum-gateway"} == names(run, "services")
    assert names(run, "deployments,daemonsets") == set()
    install(run)
    assert names(run, "deployments,daemonsets") == {"nitsum-operator", "nitsum-gateway", "nitsum-agent-gpu"}
    assert "nitsum-gateway" in names(run, "poddisruptionbudgets")
    install(run, "--set", "workloads.enabled=false")
    assert names(run, "deployments,daemonsets") == set()


def test_pods_of_the_workloads_meet_restricted_pod_security(run: Run, tmp_path: Path) -> None:
    install(run)
    # Enforced on pods only, so each template is tried as a pod.
    run("kubectl", "label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    for item in json.loads(run("kubectl", "get", "deployments,daemonsets", "-o", "json"))["items"]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": item["spec"]["template"]["spec"]}
        path = tmp_path / "pod.json"
        path.write_text(json.dumps(pod))
        run("kubectl", "create", "--dry-run=server", "-f", str(path))


ALLOWED = [
    ("watch", "servingpools.nitsum.io", "-A"),
    ("patch", "servingpools.nitsum.io/status", "-A"),
    ("create", "servingnodes.nitsum.io", ""),
    ("patch", "servingnodes.nitsum.io/status", ""),
    ("watch", "nodes", ""),
    ("list", "endpointslices.discovery.k8s.io", ""),
    ("update", "leases.coordination.k8s.io/nitsum-operator", ""),
    ("create", "leases.coordination.k8s.io", ""),
    ("create", "secrets", ""),
    ("update", "secrets/nitsum-ca", ""),
    ("create", "events.events.k8s.io", "-A"),
]
DENIED = [
    ("update", "servingpools.nitsum.io", ""),
    ("delete", "servingpools.nitsum.io", ""),
    ("get", "secrets/somebody-elses", ""),
    ("list", "secrets", ""),
    ("update", "nodes", ""),
    ("create", "pods", ""),
    ("create", "events", "-A"),
    ("list", "events.events.k8s.io", "-A"),
    ("patch", "events.events.k8s.io", "-A"),
    ("update", "leases.coordination.k8s.io", ""),
    ("patch", "servingnodes.nitsum.io", ""),
    ("patch", "secrets/nitsum-ca", ""),
    ("get", "leases.coordination.k8s.io", "-A"),
]


def test_operator_may_do_its_work_and_nothing_else(run: Run) -> None:
    install(run, "--set", "workloads.enabled=false")
    found = {}
    for verb, what, scope in [*ALLOWED, *DENIED]:
        resource, _, name = what.partition("/")
        words = [f"--subresource={name}", resource] if name == "status" else [what]
        check = run_can_i(run, verb, words, scope)
        found[verb, what, scope] = check
    assert {k for k, yes in found.items() if yes} == set(ALLOWED)


def run_can_i(run: Run, verb: str, words: list[str], scope: str) -> bool:
    account = f"--as=system:serviceaccount:{NAMESPACE}:nitsum-operator"
    try:
        return run("kubectl", "auth", "can-i", verb, *words, account, *([scope] if scope else [])).strip() == "yes"
    except AssertionError:
        return False


def test_an_upgrade_of_the_chart_upgrades_the_crds(
    installed: ControlPlane, submit: Callable[..., Any], binaries: dict[str, Path], kubectl: Callable[..., str], tmp_path: Path
) -> None:
    """Helm would never touch files in `crds/`; ours are templates."""

    def columns() -> list[str]:
        return kubectl(
            "get", "crd", "servingpools.nitsum.io", "-o", "jsonpath={.spec.versions[0].additionalPrinterColumns[*].name}"
        ).split()

    newer = shutil.copytree(CHART, tmp_path / "nitsum")
    crd = newer / "files/crds/nitsum.io_servingpools.yaml"
    text = crd.read_text()
    column = "        - {name: Profile, type: string, priority: 1, jsonPath: .status.plan.profile, description: Profile.}\n"
    crd.write_text(text.replace("        - {name: Age,", f"{column}        - {{name: Age,"))
    before = columns()
    upgrade = functools.partial(install_chart, installed.admin_kubeconfig, binaries["helm"], installed.state_dir)
    submit(upgrade(chart=newer))
    assert columns() == [*before[:-1], "Profile", "Age"]
    submit(upgrade())
    assert columns() == before
