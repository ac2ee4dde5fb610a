"""The API server itself refuses illegal pools, with the field and what to do about it.

Runs where the chart is `installed`, as `admin_kubeconfig`; or on the server of `TEST_KUBECONFIG`, which then gets the CRDs.
"""

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAMESPACE = "test-resources"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    own = os.environ.get("TEST_KUBECONFIG")
    if own is None:
        request.getfixturevalue("installed")
    kubeconfig = own or str(request.getfixturevalue("admin_kubeconfig"))

    def kubectl(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", "--kubeconfig", kubeconfig, "--namespace", NAMESPACE, *args]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)

    if own is not None:
        applied = kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
        assert applied.returncode == 0, applied.stderr
    waited = kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/servingpools.nitsum.io", "crd/servingnodes.nitsum.io")
    assert waited.returncode == 0, waited.stderr
    kubectl("create", "namespace", NAMESPACE)
    yield kubectl
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def chat() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "examples/chat.yaml").read_text())
    return found


def changed(path: str, value: Any) -> dict[str, Any]:
    """The chat example with `spec.<path>` set, or removed where value is None."""
    obj = copy.deepcopy(chat())
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node: Any = obj["spec"]
    for key in parents:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return obj


ONE = {"name": "a"}
DURATION, SHARE = "number and a unit", "percentage above 0% and up to 100%"
ILLEGAL: list[tuple[str, Any, str, str]] = [
    # what is set, to what, the field that the message names, the remedy in it
    ("tiers", [ONE, ONE], "spec.tiers", "rename one of them"),
    ("tiers", [{"name": "a", "default": True}, {"name": "b", "default": True}], "spec.tiers", "keep it on one tier"),
    ("tiers", [{"name": f"t{i}"} for i in range(17)], "spec.tiers", "at most 16"),
    ("tiers", [], "spec.tiers", "at least 1"),
    ("tiers", None, "spec.tiers", "Required"),
    ("tiers.0.name", "Interactive Tier", "spec.tiers[0].name", "lower-case letters"),
    ("tiers.0.name", "default", "spec.tiers[0].name", "choose another name"),
    ("tiers.0.ttft", "0s", "spec.tiers[0].ttft", DURATION),
    ("tiers.0.ttft", "2h", "spec.tiers[0].ttft", DURATION),
    ("tiers.0.ttft", "3601s", "spec.tiers[0].ttft", DURATION),
    ("tiers.1.tpot", "-5ms", "spec.tiers[1].tpot", DURATION),
    ("tiers.1.tpot", "fast", "spec.tiers[1].tpot", DURATION),
    ("tiers.1.tpot", "20", "spec.tiers[1].tpot", DURATION),
    ("tiers.0.target", "0%", "spec.tiers[0].target", SHARE),
    ("tiers.0.target", "101%", "spec.tiers[0].target", SHARE),
    ("tiers.0.target", "0.99", "spec.tiers[0].target", SHARE),
    ("tiers", [{"name": "a", "target": "99%"}], "spec.tiers[0]", "set ttft or tpot, or remove target"),
    ("tiers.0.weight", 0, "spec.tiers[0].weight", "greater than or equal to 1"),
    ("budget.gpus", 0, "spec.budget.gpus", "greater than or equal to 1"),
    ("tensorParallel.allowed", [4, 8], "spec.budget.gpus", "raise spec.budget.gpus"),
    ("tensorParallel.allowed", [1, 2, 3], "spec.tensorParallel.allowed", "remove those that do not fit"),
    ("tensorParallel.allowed", [1, 1], "spec.tensorParallel.allowed", "remove the repetition"),
    ("tensorParallel.allowed", [0], "spec.tensorParallel.allowed[0]", "greater than or equal to 1"),
    ("model.source", {}, "spec.model.source", "exactly one of huggingFace, pvc, path"),
    ("model.source.huggingFace", {"repo": "a/b"}, "spec.model.source", "exactly one of huggingFace, pvc, path"),
    ("model.source.path", "models/x", "spec.model.source.path", "absolute path"),
    ("model.source.path", "/models/../etc", "spec.model.source.path", "without .. segments"),
    ("model.source", {"pvc": {"claimName": "c", "path": "../x"}}, "spec.model.source.pvc.path", "relative to the volume"),
    ("model.source", {"huggingFace": {"repo": "a/b/c"}}, "spec.model.source.huggingFace.repo", "owner/name"),
    ("model.name", "my model", "spec.model.name", "rename it"),
    ("model.name", None, "spec.model.name", "Required"),
    ("adaptation.mode", "Fast", "spec.adaptation.mode", '"Active", "Advisory", "Frozen"'),
]


@pytest.mark.parametrize(("path", "value", "field", "remedy"), ILLEGAL)
def test_illegal_pool_is_refused_with_field_and_remedy(run: Run, path: str, value: Any, field: str, remedy: str) -> None:
    refused = run("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(changed(path, value)))
    assert refused.returncode != 0
    assert f"{field}:" in refused.stderr, refused.stderr
    assert remedy in refused.stderr, refused.stderr


LEGAL: list[tuple[str, Any]] = [
    ("tiers.0.ttft", "1h"),
    ("tiers.0.tpot", "1.5ms"),
    ("tiers.0.target", "100%"),
    ("tiers.0.target", "99.95%"),
    ("tensorParallel.allowed", []),
    ("tensorParallel.allowed", [2, 4, 8]),
    ("model.name", "HuggingFaceTB/SmolLM2-135M:v1"),
    ("model.source", {"huggingFace": {"repo": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "main"}}),
    ("model.source", {"pvc": {"claimName": "models"}}),
    ("budget.nodeSelector", {"gpu": "h100"}),
]


@pytest.mark.parametrize(("path", "value"), LEGAL)
def test_legal_pool_is_admitted(run: Run, path: str, value: Any) -> None:
    admitted = run("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(changed(path, value)))
    assert admitted.returncode == 0, admitted.stderr


def test_unknown_field_fails_under_strict_validation(run: Run) -> None:
    refused = run("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=yaml.safe_dump(changed("budget.gpu", 3)))
    assert refused.returncode != 0
    assert "spec.budget.gpu" in refused.stderr


def test_explain_reads_well(run: Run) -> None:
    text = run("explain", "servingpool.spec.tiers").stdout
    for word in ("ttft", "tpot", "target", "weight", "default", "Longest time to first token", "background"):
        assert word in text
    mode = run("explain", "servingpool.spec.adaptation.mode").stdout
    assert all(word in mode for word in ("ENUM", "Active", "Advisory", "Frozen", "never change a layout"))


def test_columns_show_status(run: Run) -> None:
    for example in ("chat", "tiny"):
        applied = run("apply", "-f", str(ROOT / f"examples/{example}.yaml"))
        assert applied.returncode == 0, applied.stderr
    status = """
      {"observedGeneration": 1, "layout": "1xTP3", "attainment": "98.2%", "goodput": "3.1/s", "reason": "Serving", "flips": 2,
       "tiersSummary": "interactive 99%", "gpus": {"budget": 3, "used": 3, "summary": "3/3"}, "conditions": [{"type": "Ready",
       "status": "True", "reason": "Serving", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}"""
    patched = run("patch", "spool", "chat", "--subresource=status", "--type=merge", "-p", f'{{"status": {status}}}')
    assert patched.returncode == 0, patched.stderr
    head, chat_row = run("get", "spool", "chat", "-o", "wide").stdout.splitlines()
    assert head.split() == ["NAME", "MODEL", "GPUS", "LAYOUT", "ATTAINMENT", "GOODPUT", "READY", "REASON", "TIERS", "FLIPS", "AGE"]
    assert chat_row.split()[1:9] == ["smollm2-135m-instruct", "3/3", "1xTP3", "98.2%", "3.1/s", "True", "Serving", "interactive"]
    narrow = run("get", "servingpools").stdout.splitlines()[0]
    assert narrow.split() == ["NAME", "MODEL", "GPUS", "LAYOUT", "ATTAINMENT", "GOODPUT", "READY", "REASON", "AGE"]
    # The category holds both kinds, and other tests of the session may have written nodes: only its pools are counted on.
    assert {"servingpool.nitsum.io/chat", "servingpool.nitsum.io/tiny"} <= set(run("get", "nitsum", "-o", "name").stdout.split())
