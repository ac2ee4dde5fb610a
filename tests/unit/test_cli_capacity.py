"""`nitsum capacity` as a user runs it, and what must hold of its curve."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nitsum.planner import sizing
from nitsum.planner.slow import SlowPlane
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
DEMAND = "tiers: {chat: {rate: RATE, prompt: {mean: 1000, cv: 1}, output: 200}, agents: {rate: 5, prompt: 500, output: 100}}"


def capacity(folder: Path, rate: float = 20, tpot: str = "15ms", fleet: str = "1x8:h100_sxm", pool: str = POOL) -> tuple[int, str, Path]:
    (folder / "pool.yaml").write_text(pool.replace("TPOT", tpot))
    (folder / "d.yaml").write_text(DEMAND.replace("RATE", str(rate)))
    out = folder / "out.json"
    arguments = ["capacity", "--pool", str(folder / "pool.yaml"), "--fleet", fleet, "--demand", str(folder / "d.yaml"), "--json", str(out)]
    found = CliRunner().invoke(app, arguments)
    return found.exit_code, found.output, out


def test_more_demand_needs_more_gpus_and_looser_targets_never_do(tmp_path: Path) -> None:
    code, said, out = capacity(tmp_path, rate=40)
    assert code == 0, said
    figures = json.loads(out.read_text())
    assert f"needs {figures['gpus']} GPUs" in said
    assert "step times: modelled" in said
    assert sum(int(tp) * n for tp, n in figures["groups_by_tp"].items()) <= figures["gpus"]
    assert all(t["feasible"] for t in figures["tiers"].values())
    rows: dict[tuple[str, str], list[int | None]] = {}
    for p in figures["curve"]:
        rows.setdefault((p["tier"], p["target"]), []).append(p["gpus"])
        if p["factor"] == 1:
            assert p["gpus"] == figures["gpus"]
    assert set(rows) == {("chat", "ttft_ms"), ("chat", "tpot_ms"), ("agents", "ttft_ms"), ("agents", "tpot_ms")}
    for row in rows.values():
        known = [10**9 if n is None else n for n in row]
        assert known == sorted(known, reverse=True)
    strict = rows["chat", "tpot_ms"]
    assert strict[0] is None or strict[0] > figures["gpus"], "half of 15 ms costs GPUs"
    assert json.loads(capacity(tmp_path, rate=160)[2].read_text())["gpus"] > 2 * figures["gpus"]


def test_the_budget_of_the_pool_is_not_looked_at(tmp_path: Path) -> None:
    assert capacity(tmp_path)[2].read_text() == capacity(tmp_path, pool=POOL.replace("gpus: 8", "gpus: 2"))[2].read_text()


def test_targets_that_no_tp_holds_are_named(tmp_path: Path) -> None:
    code, said, out = capacity(tmp_path, rate=1, tpot="1ms")
    assert code == 1
    assert "no number of GPUs" in said
    assert "chat: TPOT at every TP" in " ".join(said.split())
    figures = json.loads(out.read_text())
    assert (figures["gpus"], figures["infeasible"]) == (None, ["chat"])
    # What would do is in the curve where it is near enough.
    assert {p["gpus"] for p in figures["curve"] if (p["tier"], p["target"]) == ("chat", "ttft_ms")} == {None}


@pytest.mark.parametrize(
    ("fleet", "pool", "wrong"),
    [
        ("8:h100", POOL, "fleet: '8:h100' is not NODESxGPUS:TYPE"),
        ("1x8:h100,1x4:h100", POOL, "fleet: '1x8:h100,1x4:h100' has nodes of 2 shapes"),
        ("1x8:gtx", POOL, "gtx"),
        (
            "1x2:h100_sxm",
            POOL.replace("  tiers:", "  tensorParallel: {allowed: [4, 8]}\n  tiers:"),
            "spec.tensorParallel.allowed: 4, 8: none fits",
        ),
        (
            "1x8:h100_sxm",
            POOL.replace(", ttft: 500ms, tpot: TPOT", "").replace(", ttft: 1s, tpot: 40ms", ""),
            "spec.tiers: none has a ttft",
        ),
    ],
)
def test_bad_input_is_named(tmp_path: Path, fleet: str, pool: str, wrong: str) -> None:
    code, said, _ = capacity(tmp_path, fleet=fleet, pool=pool)
    assert (code, wrong in said.replace("\n", " ")) == (2, True), said


def test_one_of_demand_and_workload(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(POOL.replace("TPOT", "15ms"))
    found = CliRunner().invoke(app, ["capacity", "--pool", str(tmp_path / "pool.yaml")])
    assert (found.exit_code, "demand: give either --demand or --workload" in found.output) == (2, True)


def test_the_least_is_the_least() -> None:
    from nitsum.demand import TierDemand
    from nitsum.perf.profile import load_shipped
    from nitsum.pool import Pool, Tier

    times = load_shipped("llama-3.1-8b-instruct.h100_sxm")
    pool = Pool("default/x", "u", times.model, (Tier("chat", 500, 15),), 1)
    demand = (TierDemand(pool.name, "chat", 60.0, 0.0, 1.0, 1000, 1.0, 200, 0.8),)
    q, planner = sizing.Question(pool, demand, times, times, 8, "h100_sxm"), SlowPlane()
    found = sizing.needed(q, planner)
    assert found.gpus is not None
    assert found.gpus > 1
    assert not sizing._planned(q, found.gpus, planner).infeasible
    assert sizing._planned(q, found.gpus - 1, planner).infeasible
    assert sizing.needed(q, planner, start=3 * found.gpus).gpus == found.gpus
