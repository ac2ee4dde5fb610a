"""`nitsum simulate` as a user meets it: the same bytes for a seed, and bad input that names its field with exit code 2."""

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nitsum_cli.main import app

POOL = """
apiVersion: nitsum.io/v1alpha1
kind: ServingPool
metadata: {name: tiny}
spec:
  model: {name: tiny-llama, source: {path: /models/tiny}, contextLength: 400}
  budget: {gpus: 2}
  tiers:
    - {name: interactive, ttft: 2s, tpot: 80ms, default: true}
    - {name: agents, ttft: 9s, tpot: 200ms}
"""
WORKLOAD = """
duration: 40s
streams:
  - {tier: interactive, trace: {format: azure, path: traces/a.csv.gz}, rate: 0.4}
  - {tier: agents, synthetic: {arrivals: poisson, prompt: 60, output: 20}, rate: 0.5}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pool.yaml").write_text(POOL)
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    (tmp_path / "traces").mkdir()
    rows = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.5000000,{100 if i % 5 else 900},{20 + i % 7}" for i in range(300)]
    with gzip.open(tmp_path / "traces/a.csv.gz", "wt", newline="") as f:
        f.write("\r\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\r\n")
    return tmp_path


def run(folder: Path, *more: str) -> tuple[int, str]:
    args = ["simulate", "--workload", str(folder / "workload.yaml"), "--pool", str(folder / "pool.yaml"), "--fleet", "1x2:slot"]
    result = CliRunner().invoke(app, [*args, "--policy", "plain-tp1,static-tpN", *more])
    return result.exit_code, result.output


def test_writes_the_same_bytes_for_the_same_seed(folder: Path) -> None:
    for name, seed in (("one", "7"), ("two", "7"), ("three", "8")):
        code, said = run(folder, "--json", str(folder / name), "--seed", seed)
        assert code == 0, said
        assert "step times: modelled, profile tiny-llama" in said or "step times: measured, profile tiny-llama" in said
    one, two, three = ((folder / n).read_bytes() for n in ("one", "two", "three"))
    assert one == two != three
    found = json.loads(one)
    assert list(found["policies"]) == ["plain-tp1", "static-tp1", "static-tp2"]
    f = found["policies"]["static-tp2"]
    assert {"goodput_rps", "attainment", "offered_rps", "refused", "too_long", "flips", "gpus_max", "tiers"} <= set(f)
    assert f["too_long"] > 0
    assert 0 <= f["attainment"] <= 1
    assert set(f["tiers"]["agents"]) == {"goodput_rps", "attainment", "offered_rps", "ttft_ms", "tpot_ms"}


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("workload.yaml", "tier: agents", "tier: agnts", "streams[1].tier: the pool has no tier 'agnts'; it has interactive, agents"),
        ("workload.yaml", "azure", "azur", "streams[0].trace.format: 'azur' is not one of azure, servegen, mooncake"),
        ("workload.yaml", "a.csv.gz", "b.csv.gz", "b.csv.gz: cannot be read: No such file"),
        ("workload.yaml", "duration: 40s", "duration: 40", "duration: 40 is not a duration"),
        ("workload.yaml", "streams:", "streams: [", "workload.yaml: line"),
        ("workload.yaml", "rate: 0.5", "rat: 0.5", "streams[1].rat: unknown field; known are tier, trace"),
        ("pool.yaml", "tpot: 80ms", "tpot: fast", "spec.tiers[0].tpot"),
        ("pool.yaml", "tpot: 80ms", "tpott: 80ms", "spec.tiers[0].tpott: unknown field; known are name"),
        ("pool.yaml", "kind: ServingPool", "kind: Pool", "must be one manifest of kind ServingPool"),
        ("pool.yaml", "name: tiny-llama", "name: other", "spec.profile: there is no profile of other on slot"),
    ],
)
def test_bad_files_name_the_field(folder: Path, file: str, old: str, new: str, said: str) -> None:
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    code, output = run(folder)
    assert code == 2, output
    assert said.replace("azure, servegen, mooncake", "azure, mooncake, servegen") in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "nitsum,magic"], "policy: no policy 'magic'; there are plain-tpN"),
        (["--policy", "static-tp3"], "TP 3 is not legal here; legal are 1, 2"),
        (["--fleet", "8:h100"], "fleet: '8:h100' is not NODESxGPUS:TYPE"),
        (["--fleet", "1x2:foo"], "there is no profile of tiny-llama on foo"),
        (["--scale", "0"], "scale: 0.0 must be above 0"),
        (["--profile", "/nowhere.json"], "/nowhere.json: cannot be read"),
    ],
)
def test_bad_options_name_themselves(folder: Path, options: list[str], said: str) -> None:
    code, output = run(folder, *options)
    assert (code, said in output) == (2, True), output


def test_a_damaged_trace_names_the_file(folder: Path) -> None:
    path = folder / "traces/a.csv.gz"
    path.write_bytes(path.read_bytes()[:200])
    code, output = run(folder)
    assert code == 2
    assert "a.csv.gz: cannot be read" in output
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.5,-3,4\n")
    code, output = run(folder)
    assert code == 2
    assert "a.csv.gz: line 2: 1 row(s) with a negative ContextTokens" in output
