"""`nitsum plan`: what the planner would do with a demand on an idle fleet, why, what it rejected, and what an infeasible tier lacks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nitsum import demand_spec
from nitsum.demand import TierDemand
from nitsum.errors import InvalidSpec
from nitsum.layout import ORDER, sort_of
from nitsum.planner import NodeView, PlannerSettings, Snapshot
from nitsum.planner.planes import Planes
from nitsum.pool import Pool
from nitsum.sim import arrivals, hardware, workload
from nitsum.sim.demand import Foresight
from nitsum_cli import files
from nitsum_cli.errors import bad_input_exits_2
from nitsum_cli.simulate import origin, read_pool, read_profile


def read_demand(demand_path: Path | None, workload_path: Path | None, pool: Pool, context: int) -> tuple[TierDemand, ...]:
    """Of a demand file, or the mean of a whole workload. Raises InvalidSpec."""
    if (demand_path is None) == (workload_path is None):
        raise InvalidSpec("demand", "give either --demand or --workload")
    names = tuple(t.name for t in pool.tiers)
    if demand_path is not None:
        return demand_spec.parse(files.load_yaml(demand_path), pool.name, names)
    assert workload_path is not None
    spec = workload.parse(files.load_yaml(workload_path), names)
    traffic = arrivals.build(spec, lambda path: files.lines(workload_path.parent / path), 1, 1.0, context)
    return Foresight(pool.name, names, traffic)(0.0, traffic.duration_s)


@bad_input_exits_2
def command(
    pool_path: Annotated[Path, typer.Option("--pool", help="a ServingPool manifest")],
    fleet: Annotated[str, typer.Option(help="NODESxGPUS:TYPE, like 1x8:h100_sxm")],
    demand_path: Annotated[
        Path | None, typer.Option("--demand", help="YAML: rate, burstiness and lengths by tier (docs/planner.md)")
    ] = None,
    workload_path: Annotated[Path | None, typer.Option("--workload", help="YAML, as `nitsum simulate` takes it: its mean demand")] = None,
    profile: Annotated[Path | None, typer.Option(help="step times; default: the shipped profile of model and GPU")] = None,
    headroom: Annotated[float, typer.Option(min=0.5, max=0.999, help="quantile of an uncertain rate to plan for")] = 0.9,
) -> None:
    """Plans a pool on an idle fleet and says why. Exit code 1 where a tier cannot hold its targets."""
    pool, model = read_pool(pool_path)
    types = hardware.gpu_types(fleet)
    hardware.fleet(fleet, pool.model, ())
    times = read_profile(profile, pool, types)
    nodes = tuple(NodeView(n) for n in hardware.fleet(fleet, pool.model, times.tp_sizes))
    context = int(model.context_length or getattr(times, "context_length", 0) or 0)
    asked = read_demand(demand_path, workload_path, pool, context)
    settings = PlannerSettings(headroom_quantile=headroom)
    taken = Snapshot((pool,), nodes, asked, {pool.name: times}, {pool.name: times}, settings)
    plan = Planes()(taken, 0.0)  # as the operator runs it
    (found,) = plan.pools
    console = Console()
    shapes: dict[tuple[int, int, str], int] = {}
    for n in plan.nodes:
        for g in n.layout.groups:
            key = ORDER.index(g.role), g.tp_size, "+".join(s.tier for s in g.shares if s.share > 0) or "any tier"
            shapes[key] = shapes.get(key, 0) + 1
    console.print(
        f"{pool.name}: {found.gpus} of {pool.budget_gpus} GPUs, expected goodput {found.expected_goodput:.2f} requests/s", highlight=False
    )
    for (role, tp_size, tiers), count in sorted(shapes.items()):
        console.print(f"  {count} x {sort_of(tp_size, ORDER[role])} for {tiers}", highlight=False)
    table = Table("tier", "planned/s", "safe/s", "slack", "holds", "binds", box=SIMPLE)
    for t in found.tiers:
        slack = "-" if t.rate <= 0 else f"{t.slack:.2f}x"
        table.add_row(t.tier, f"{t.rate:.2f}", f"{t.safe_rate:.2f}", slack, "yes" if t.feasible else "NO", t.binding)
    console.print(table)
    console.print(origin(times), highlight=False, markup=False)
    for label, lines in (("why", found.reasons), ("rejected", found.rejected)):
        for line in lines:
            console.print(f"{label}: {line}", highlight=False)
    infeasible = {t.tier for t in found.tiers if not t.feasible}
    for line in found.remedies:
        console.print(f"to hold it: {line}", highlight=False)
    console.print("infeasible" if infeasible or not found.gpus else "feasible", highlight=False)
    if infeasible or not found.gpus:
        raise typer.Exit(1)
