"""`nitsum capacity`: how many GPUs a mix of tiers needs, and what each of its targets costs in GPUs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nitsum.errors import InvalidSpec
from nitsum.planner import PlannerSettings
from nitsum.planner.sizing import FACTORS, GPUS_MAX, CurvePoint, Question, Sizing, size
from nitsum.planner.slow import SlowPlane
from nitsum.planner.words import describe
from nitsum.sim import hardware
from nitsum_cli import files
from nitsum_cli.errors import bad_input_exits_2
from nitsum_cli.plan import read_demand
from nitsum_cli.simulate import origin, read_pool, read_profile

LABELS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT"}


@bad_input_exits_2
def command(
    pool_path: Annotated[Path, typer.Option("--pool", help="a ServingPool manifest; its budget is not looked at")],
    workload_path: Annotated[Path | None, typer.Option("--workload", help="YAML, as `nitsum simulate` takes it: its mean demand")] = None,
    demand_path: Annotated[
        Path | None, typer.Option("--demand", help="YAML: rate, burstiness and lengths by tier (docs/planner.md)")
    ] = None,
    fleet: Annotated[str, typer.Option(help="1xGPUS:TYPE, the shape of a node; there are as many as needed")] = "1x8:h100_sxm",
    profile: Annotated[Path | None, typer.Option(help="step times; default: the shipped profile of model and GPU")] = None,
    headroom: Annotated[float, typer.Option(min=0.5, max=0.999, help="quantile of an uncertain rate to plan for")] = 0.9,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """How many GPUs this mix needs, and what each SLO costs. Exit code 1 where no number of GPUs holds every target."""
    if json_path is not None and not json_path.parent.is_dir():
        raise InvalidSpec("json", f"there is no folder {json_path.parent}")
    pool, model = read_pool(pool_path)
    if all(t.background for t in pool.tiers):
        raise InvalidSpec("spec.tiers", "none has a ttft or a tpot, so any number of GPUs will do; give one to at least one tier")
    nodes = hardware.fleet(fleet, pool.model, ())
    shapes = {(len(n.gpus), n.gpus[0].type) for n in nodes}
    if len(shapes) != 1:
        raise InvalidSpec("fleet", f"{fleet!r} has nodes of {len(shapes)} shapes; give one, like 1x8:h100_sxm")
    ((gpus, kind),) = shapes
    times = read_profile(profile, pool, hardware.gpu_types(fleet))
    if not any(tp <= gpus and (not pool.allowed_tp or tp in pool.allowed_tp) for tp in times.tp_sizes):
        allowed = ", ".join(map(str, pool.allowed_tp)) or "any"
        raise InvalidSpec(
            "spec.tensorParallel.allowed", f"{allowed}: none fits a node of {gpus}; the profile has {', '.join(map(str, times.tp_sizes))}"
        )
    context = int(model.context_length or getattr(times, "context_length", 0) or 0)
    asked = read_demand(demand_path, workload_path, pool, context)
    question = Question(pool, asked, times, times, gpus, kind, PlannerSettings(headroom_quantile=headroom))
    planner, console = SlowPlane(governed=True), Console()
    with Console(stderr=True).status("planning") as status:
        found = size(question, planner, lambda text: status.update(f"planning, {text}"))
    base = found.base
    if json_path is not None:
        files.write(json_path, json.dumps(_document(pool.name, fleet, found, times.name, times.origin), indent=1) + "\n")
    if base.gpus is None:
        wrong = "; ".join(f"{t.tier}: {t.binding or 'no group is left for it'}" for t in base.plan.tiers if not t.feasible)
        console.print(f"{pool.name}: no number of GPUs up to {GPUS_MAX} holds every target ({wrong})", highlight=False)
    else:
        console.print(f"{pool.name}: needs {base.gpus} GPUs ({describe(base.groups)})", highlight=False)
        for t in base.plan.tiers:
            slack = "-" if t.rate <= 0 else f"{t.slack:.2f}x"
            console.print(
                f"  {t.tier}: {t.rate:.2f} requests/s planned, {t.safe_rate:.2f} safe ({slack}); binds: {t.binding}", highlight=False
            )
    _show(found.curve, console)
    console.print(origin(times), highlight=False, markup=False)
    if base.gpus is None:
        raise typer.Exit(1)


def _show(points: tuple[CurvePoint, ...], console: Console) -> None:
    table = Table("tier", "target", *(f"x {f:g}" for f in FACTORS), title="GPUs needed with one target changed", box=SIMPLE)
    for tier, target in dict.fromkeys((p.tier, p.target) for p in points):
        row = [p for p in points if (p.tier, p.target) == (tier, target)]
        own = next(p.target_ms for p in row if p.factor == 1)
        table.add_row(tier, f"{LABELS[target]} {own:g} ms", *("none holds" if p.gpus is None else str(p.gpus) for p in row))
    console.print(table)


def _document(pool: str, fleet: str, found: Sizing, profile: str, origin: str) -> dict[str, Any]:
    base = found.base
    return {
        "pool": pool,
        "fleet": fleet,
        "profile": {"name": profile, "origin": origin},
        "gpus": base.gpus,
        "groups_by_tp": {str(tp): sum(of == tp for _, of in base.groups) for tp in sorted({tp for _, tp in base.groups})},
        "infeasible": list(base.infeasible),
        "tiers": {
            t.tier: {"rate_rps": round(t.rate, 6), "safe_rps": round(t.safe_rate, 6), "feasible": t.feasible, "binding": t.binding}
            for t in base.plan.tiers
        },
        "curve": [
            {"tier": p.tier, "target": p.target, "factor": p.factor, "target_ms": round(p.target_ms, 6), "gpus": p.gpus}
            for p in found.curve
        ],
    }
