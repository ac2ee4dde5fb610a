"""What the chart renders, word for word. `UPDATE_GOLDEN=1 pytest tests/golden` writes it anew; read the diff before committing it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/nitsum"
GOLDEN = Path(__file__).parent / "chart"


@pytest.fixture(scope="session")
def helm() -> str:
    try:
        from nitsum_local.binaries import ensure
    except ImportError:
        found = shutil.which("helm", path=f"{os.environ.get('KUBEBUILDER_ASSETS', '')}:{os.environ['PATH']}")
        assert found is not None, "helm is on neither KUBEBUILDER_ASSETS nor PATH"
        return found
    return str(ensure(("helm",))["helm"])


def render(helm: str, *flags: str) -> str:
    # A fixed Kubernetes version: renders must not depend on the helm binary's.
    command = [helm, "template", "nitsum", str(CHART), "--namespace", "nitsum", "--kube-version", "1.35.0", *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("name", "flags"),
    [("default", ("--set", "crds.install=false")), ("workloads-off", ("--set", "crds.install=false,workloads.enabled=false"))],
)
def test_render_is_the_golden_one(helm: str, name: str, flags: tuple[str, ...]) -> None:
    found, path = render(helm, *flags), GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"the chart renders something else than {path}; UPDATE_GOLDEN=1 writes it anew"


def test_chart_carries_the_crds_of_the_one_source(helm: str) -> None:
    source = {p.name: p.read_text() for p in (ROOT / "crds").glob("*.yaml")}
    assert source == {p.name: p.read_text() for p in (CHART / "files/crds").glob("*.yaml")}, "cp crds/*.yaml charts/nitsum/files/crds/"
    rendered = render(helm)
    assert all(text.strip() in rendered for text in source.values())
    assert all("helm.sh/resource-policy: keep" in text for text in source.values()), "uninstalling the chart would delete every pool"


def test_lint(helm: str) -> None:
    subprocess.run([helm, "lint", "--strict", str(CHART)], check=True, capture_output=True, timeout=60)


def test_engine_hosts_and_gateways_find_checkpoints_at_the_same_place(helm: str) -> None:
    rendered = [d for d in yaml.safe_load_all(render(helm, "--set", "agent.modelClaims={chat-model,b.c}")) if d]
    found = {}
    for d in rendered:
        if d["kind"] in ("Deployment", "DaemonSet"):
            spec = d["spec"]["template"]["spec"]
            claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec.get("volumes", []) if "persistentVolumeClaim" in v}
            for c in spec["containers"]:
                mounts = [m for m in c.get("volumeMounts", []) if m["name"] in claims]
                found[c["name"]] = {claims[m["name"]]: m["mountPath"] for m in mounts}
                assert all(m["readOnly"] for m in mounts)
    models = {c: f"/var/lib/nitsum/volumes/{c}" for c in ("chat-model", "b.c")}
    assert found == {"operator": {}, "agent": {}, "host": models, "gateway": models}


def test_two_node_groups_of_one_name_are_refused(helm: str) -> None:
    group = '{"name":"a","gpusPerNode":1}'
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render(helm, "--set-json", f"agent.nodeGroups=[{group},{group}]")
    assert "rename one of them" in refused.value.stderr


@pytest.mark.parametrize("flag", ["gateway.replicas=0", "typo=1", "agent.stateVolume.hostPath.path=/x", "operator.healthPort=80"])
def test_values_that_make_no_sense_are_refused(helm: str, flag: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render(helm, "--set", flag)
    assert flag.split("=")[0].split(".")[-1] in refused.value.stderr or "stateVolume" in refused.value.stderr
