"""`nitsum plan` as a user runs it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nitsum_cli.main import app

POOL = """
apiVersion: nitsum.io/v1alpha1
kind: ServingPool
metadata: {name: chat}
spec:
  model: {name: meta-llama/Llama-3.1-8B-Instruct, source: {path: /models/llama}}
  budget: {gpus: 8}
  tiers:
    - {name: chat, ttft: 500ms, tpot: TPOT, weight: 4, default: true}
    - {name: agents, ttft: 1s, tpot: 40ms}
"""


def plan(folder: Path, demand: str, tpot: str = "20ms", fleet: str = "1x8:h100_sxm") -> tuple[int, str]:
    (folder / "pool.yaml").write_text(POOL.replace("TPOT", tpot))
    (folder / "d.yaml").write_text(demand)
    arguments = ["plan", "--pool", str(folder / "pool.yaml"), "--fleet", fleet, "--demand", str(folder / "d.yaml")]
    found = CliRunner().invoke(app, arguments)
    return found.exit_code, found.output


def test_a_feasible_demand(tmp_path: Path) -> None:
    code, said = plan(
        tmp_path, "tiers: {chat: {rate: 10, prompt: {mean: 1000, cv: 1}, output: 200}, agents: {rate: 5, prompt: 500, output: 100}}"
    )
    assert code == 0, said
    assert "8 of 8 GPUs" in said
    assert "why: first layout" in said
    assert said.rstrip().endswith("feasible")


def test_an_infeasible_one_says_what_would_do(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "tiers: {chat: {rate: 900, prompt: 1000, output: 200}}")
    assert code == 1
    assert "GPUs in all would hold" in said
    code, said = plan(tmp_path, "tiers: {chat: {rate: 1, prompt: 1000, output: 200}}", tpot="1ms")
    assert code == 1
    assert "no TP holds its targets" in said
    assert "a TPOT of" in said


def test_roles_in_plain_words(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "tiers: {chat: {rate: 30, prompt: {mean: 2500, cv: 0.9}, output: {mean: 212, cv: 0.8}}}", tpot="5ms")
    assert code == 0, said
    assert "4 x TP1 prefill for chat+agents" in said
    assert "1 x TP4 decode for chat+agents" in said
    assert "why: first layout: 4xTP1 prefill + 1xTP4 decode" in said


@pytest.mark.parametrize(
    ("demand", "wrong"),
    [
        ("tiers: {chat: {rate: -1, prompt: 1, output: 1}}", "tiers.chat.rate"),
        ("tiers: {gold: {rate: 1, prompt: 1, output: 1}}", "tiers.gold"),
        ("tiers: {chat: {rate: 1, prompt: 1}}", "tiers.chat.output"),
        ("tiers: {chat: {rate: 1, prompt: {cv: 3}, output: 1}}", "tiers.chat.prompt.mean"),
        ("[]", "demand"),
        ("{tiers: {chat: {rate: 1, prompt: 1, output: 1}}, tier: {}}", "tier: unknown field; a demand has tiers alone"),
        ("tiers: {chat: {rate: 1, prompt: 1, output: 1, ouput: 2}}", "tiers.chat.ouput: unknown field; known are rate"),
    ],
)
def test_bad_demand_is_named(tmp_path: Path, demand: str, wrong: str) -> None:
    code, said = plan(tmp_path, demand)
    assert code == 2
    assert wrong in said


DEMAND = "tiers: {chat: {rate: 1, prompt: 100, output: 20}}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tpot: 40ms", "tpott: 40ms", "spec.tiers[1].tpott: unknown field; known are name, ttft, tpot, target, weight, default"),
        ("budget: {gpus: 8}", "budget: {gpu: 8}", "spec.budget.gpu: unknown field; known are gpus, nodeSelector"),
        ("  tiers:", "  tensor_parallel: {allowed: [1]}\n  tiers:", "spec.tensor_parallel: unknown field; known are model, profile,"),
        ("{path: /models/llama}", "{path: /m, huggingFace: {repo: a/b, rev: c}}", "spec.model.source.huggingFace.rev: unknown field"),
        ("{name: chat}\nspec", "{name: chat, lables: {}}\nspec", "metadata.lables: unknown field"),
        ("kind: ServingPool", "kind: ServingPool\nspecs: {}", "specs: unknown field; known are apiVersion, kind, metadata, spec"),
        ("tpot: 40ms", "tpot: 30", "spec.tiers[1].tpot: 30 has no unit; write 30ms"),
        ("ttft: 1s", "ttft: 1.5", "spec.tiers[1].ttft: 1.5 has no unit; write 1.5ms"),
        ("ttft: 1s", "ttft: 1s, target: 99", "spec.tiers[1].target: 99 has no unit; write 99%"),
    ],
)
def test_a_misspelt_field_of_the_pool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str) -> None:
    assert old in POOL
    monkeypatch.setitem(globals(), "POOL", POOL.replace(old, new))
    code, output = plan(tmp_path, DEMAND)
    assert (code, said in output) == (2, True), output


def test_node_labels_are_no_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "POOL", POOL.replace("{gpus: 8}", "{gpus: 8, nodeSelector: {any.label/x: y}}"))
    assert "unknown field" not in plan(tmp_path, DEMAND)[1]


def test_step_times_are_of_the_fleets_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "POOL", POOL.replace("spec:", "spec:\n  profile: llama-3.1-8b-instruct.h100_sxm"))
    code, said = plan(tmp_path, DEMAND, fleet="1x8:foo")
    assert code == 2
    assert "fleet: profile llama-3.1-8b-instruct.h100_sxm is of h100_sxm, not of 'foo'; shipped for meta-llama" in said.replace("\n", " ")
    code, said = plan(tmp_path, DEMAND, fleet="1x8:NVIDIA-H100-80GB-HBM3")
    assert code == 0, said
    assert "step times: modelled, profile llama-3.1-8b-instruct.h100_sxm" in said
    code, said = plan(tmp_path, DEMAND, fleet="1x4:h100,1x4:a100")
    assert (code, "not of 'a100'" in said) == (2, True), said
