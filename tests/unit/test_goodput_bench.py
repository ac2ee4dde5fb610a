"""bench/goodput.py: what is there is not made again, and tables say what cells say."""

from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import goodput_cells
    import goodput_markdown
    import goodput_plans
    import goodput_tables

    class Modules:
        cells, plans, tables, markdown = goodput_cells, goodput_plans, goodput_tables, goodput_markdown

    return Modules


def test_the_highest_load_held(bench: Any) -> None:
    held = bench.tables.held
    curve = [(10.0, 1.0), (20.0, 0.95), (30.0, 0.85), (40.0, 0.99)]
    assert held(curve, 0.9) == (pytest.approx(25.0), False)  # what comes after a load that is missed does not count
    assert held(curve, 0.99) == (pytest.approx(12.0), False)
    assert held(curve[:2], 0.9) == (20.0, True)
    assert held([(10.0, 0.2)], 0.9) == (None, False)


def test_a_sweep_goes_on_where_it_was(bench: Any, tmp_path: Path) -> None:
    store = bench.cells.Store(tmp_path, None)
    plan = bench.plans.Plan("t", "Llama-3.1-8B", 8, ("chat+agents",), (0.05, 0.1), "plain-tp1,nitsum", 5.0, (1, 1), lower_max=0)
    todo = plan.wanted(store)
    assert [(u.point.load, u.seed, u.policies) for u in todo] == [(0.05, 1, ("plain-tp1", "nitsum")), (0.1, 1, ("plain-tp1", "nitsum"))]
    assert bench.cells.run(todo[0], store, None) == 2
    assert bench.cells.run(todo[0], store, None) == 0
    assert plan.wanted(bench.cells.Store(tmp_path, None)) == todo[1:]
    store.path(todo[0].point, 1, "nitsum").unlink()
    assert bench.cells.run(todo[0], bench.cells.Store(tmp_path, None), None) == 1
    assert bench.cells.Store(tmp_path, tmp_path).folder != store.folder, "synthetic results are not those of traces"


def test_every_policy_of_the_sweep_can_be_built(bench: Any) -> None:
    tables, even, ladder = bench.plans.plans(False)
    for plan in (*tables, even, ladder):
        for mix in plan.mixes:
            names = plan.names(mix)
            bench.plans.registry.check(names, bench.plans.setting(bench.plans.MODELS[plan.model], bench.plans.MIXES[mix], plan.gpus)[0])
    assert "replicas-tp2" in tables[0].names("chat+agents")
    assert "replicas-tp8" not in tables[0].names("chat+agents")


def put(bench: Any, store: Any, plan: Any, policy: str, load: float, values: list[tuple[float, float]]) -> None:
    point = next(p for p in plan.points("chat+agents") if p.load == load)
    for seed, (good, attained) in enumerate(values, 1):
        store.put(point, seed, policy, {"goodput_rps": good, "attainment": attained, "offered_rps": point.rate})


def test_seeds_are_added_until_the_error_is_small(bench: Any, tmp_path: Path) -> None:
    store = bench.cells.Store(tmp_path, None)
    plan = bench.plans.Plan("t", "Llama-3.1-8B", 8, ("chat+agents",), (1.0,), "plain-tp1,nitsum", 5.0, (2, 3), lower_max=0)
    for policy in ("plain-tp1", "nitsum"):
        put(bench, store, plan, policy, 1.0, [(100, 0.90), (100, 0.901)])
    assert plan.wanted(store) == []
    put(bench, store, plan, "nitsum", 1.0, [(100, 0.90), (100, 0.95)])
    fresh = bench.cells.Store(tmp_path, None)
    assert [(u.seed, u.policies) for u in plan.wanted(fresh)] == [(3, ("plain-tp1", "nitsum"))]
    for policy in ("plain-tp1", "nitsum"):
        put(bench, store, plan, policy, 1.0, [(100, 0.9), (100, 0.95), (100, 0.7)])
    assert plan.wanted(bench.cells.Store(tmp_path, None)) == [], "three seeds at most"


def test_ratios(bench: Any, tmp_path: Path) -> None:
    store = bench.cells.Store(tmp_path, None)
    names = "plain-tp1,plain-tp2,static-tp1,static-partition,resplit-tp1,nitsum,oracle"
    plan = bench.plans.Plan("t", "Llama-3.1-8B", 8, ("chat+agents",), (0.5, 1.0), names, 5.0, (1, 1), lower_max=0)
    goods = {
        "plain-tp1": ((10, 0.1), (10, 0.1)),
        "plain-tp2": ((40, 0.4), (20, 0.1)),
        "static-tp1": ((80, 0.8), (90, 0.5)),
        "static-partition": ((85, 0.85), (60, 0.3)),
        "resplit-tp1": ((60, 0.6), (100, 0.5)),
        "nitsum": ((95, 0.95), (81, 0.45)),
        "oracle": ((100, 1.0), (120, 0.6)),
    }
    for policy, (low, high) in goods.items():
        put(bench, store, plan, policy, 0.5, [low])
        put(bench, store, plan, policy, 1.0, [high])
    r = bench.tables.table_of(plan, "chat+agents", store)["ratios"]
    assert r["oracle_least"] == 0.95  # only where the oracle attains 95 %
    assert (r["static_least"], r["static_best"]) == (0.9, "static-tp1")
    assert r["plain"] == (round(95 / 40, 3), "plain-tp2")
    assert r["resplit"] == (round(95 / 60, 3), "resplit-tp1")
    assert r["at_rps"] == 87.5
    row = bench.markdown.ratios([plan], store).splitlines()[-1]
    assert row == (
        "| Llama-3.1-8B | 8 | chat+agents | 95.0 / 81.0 (95% / 45%) | 0.95 / 0.68 | 1.12 / 0.90 | 1.58 / 0.81 | 2.38 / 4.05 | one seed |"
    )
    row = bench.markdown.loads([plan], store).splitlines()[-1]
    assert row == "| Llama-3.1-8B | chat+agents | 96 / - | 109 / 90 | - / - | - / - | - / - |"


def test_missing_traces_are_named(bench: Any, tmp_path: Path) -> None:
    import goodput_mixes

    assert len(goodput_mixes.missing(None)) == len(goodput_mixes.missing(tmp_path)) == 4
    for _, name in goodput_mixes.TRACES.values():
        (tmp_path / name).touch()
    assert goodput_mixes.missing(tmp_path) == []


def test_a_part_of_the_tables_is_asked_for_by_mix_fleet_and_duration(bench: Any) -> None:
    tables, _, _ = bench.plans.plans(False, short=True)
    part = bench.plans.part_of(tables, ["fast+bulk"], 8, 900.0)
    assert [(t.model, t.gpus, t.mixes, t.duration_s, t.lower_max) for t in part] == [
        (model, 8, ("fast+bulk",), 900.0, 0) for model in ("Llama-3.1-8B", "Qwen3-32B")
    ]
    assert bench.plans.part_of(tables, list(bench.plans.MIXES), None, None) == tables
    assert bench.plans.part_of(tables, ["fast+bulk"], 64, None) == (), "64 H100 have the first mixes only"
