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


def plan(folder: Path, demand: str, tpot: str = "20ms") -> tuple[int, str]:
    (folder / "pool.yaml").write_text(POOL.replace("TPOT", tpot))
    (folder / "d.yaml").write_text(demand)
    arguments = ["plan", "--pool", str(folder / "pool.yaml"), "--fleet", "1x8:h100_sxm", "--demand", str(folder / "d.yaml")]
    found = CliRunner().invoke(app, arguments)
    return found.exit_code, found.output


def test_a_feasible_demand(tmp_path: Path) -> None:
    code, said = plan(
        tmp_path, "tiers: {chat: {rate: 10, prompt: {mean: 1000, p90: 2500}, output: 200}, agents: {rate: 5, prompt: 500, output: 100}}"
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


@pytest.mark.parametrize(
    ("demand", "wrong"),
    [
        ("tiers: {chat: {rate: -1, prompt: 1, output: 1}}", "tiers.chat.rate"),
        ("tiers: {gold: {rate: 1, prompt: 1, output: 1}}", "tiers.gold"),
        ("tiers: {chat: {rate: 1, prompt: 1}}", "tiers.chat.output"),
        ("tiers: {chat: {rate: 1, prompt: {p90: 3}, output: 1}}", "tiers.chat.prompt.mean"),
        ("[]", "demand"),
    ],
)
def test_bad_demand_is_named(tmp_path: Path, demand: str, wrong: str) -> None:
    code, said = plan(tmp_path, demand)
    assert code == 2
    assert wrong in said
