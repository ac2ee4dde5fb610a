"""`nitsum simulate`: a workload against a pool on a fleet, under one policy after the other."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nitsum.errors import InvalidSpec
from nitsum.perf.names import gpu_type
from nitsum.perf.profile import Profile, find, load_shipped, parse, shipped
from nitsum.pool import Pool
from nitsum.sim import arrivals, compare, hardware, workload
from nitsum.sim.policies import registry
from nitsum_api.resources import API_VERSION, POOL_KIND, ModelSpec, check_manifest, pool_from_resource
from nitsum_cli import files, report
from nitsum_cli.errors import bad_input_exits_2
from nitsum_operator.accept import profile_for


def read_pool(path: Path) -> tuple[Pool, ModelSpec]:
    """A ServingPool manifest, judged as the operator does. Raises InvalidSpec."""
    raw = files.load_yaml(path)
    if not isinstance(raw, dict) or raw.get("kind") != POOL_KIND or raw.get("apiVersion") != API_VERSION:
        raise InvalidSpec(str(path), f"must be one manifest of kind {POOL_KIND}, apiVersion {API_VERSION}")
    meta = raw.get("metadata")
    if not isinstance(meta, dict) or not isinstance(meta.get("name"), str):
        raise InvalidSpec("metadata.name", f"missing in {path}")
    check_manifest(raw)
    return pool_from_resource({**raw, "metadata": {"namespace": "default", **meta}})


def read_profile(path: Path | None, pool: Pool, gpu_types: tuple[str, ...]) -> Profile:
    """Raises InvalidSpec; also for a GPU that the profile is not of: its step times say nothing about it."""
    try:
        found = profile_for(pool, gpu_types, {}) if path is None else parse(files.read(path), path.name)
    except InvalidSpec as e:
        if path is None and not pool.profile and e.reason == "UnknownProfile":
            raise InvalidSpec(e.path, f"{e.message}, or --profile FILE; {_there_are(pool)}", e.reason) from e
        raise
    if other := [g for g in gpu_types if gpu_type(g) != gpu_type(found.gpu)]:
        raise InvalidSpec("fleet", f"profile {found.name} is of {found.gpu}, not of {other[0]!r}; {_there_are(pool)}", "UnknownGpu")
    return found


def _there_are(pool: Pool) -> str:
    """GPU types with a shipped profile: of the pool's model, else of any."""
    every = [load_shipped(name) for name in shipped()]
    gpus = sorted({p.gpu for p in every})
    own = [g for g in gpus if find(pool.model, g)]
    return f"shipped for {pool.model if own else 'any model'} are profiles of {', '.join(own or gpus)}"


def origin(times: Profile) -> str:
    """What the figures rest on."""
    return f"step times: {times.origin}, profile {times.name} ({times.model} on {times.gpu})"


@bad_input_exits_2
def simulate(
    workload_path: Annotated[Path, typer.Option("--workload", help="YAML: duration, start, streams")],
    pool_path: Annotated[Path, typer.Option("--pool", help="a ServingPool manifest")],
    fleet: Annotated[str, typer.Option(help="NODESxGPUS:TYPE, like 1x8:h100_sxm")],
    policy: Annotated[str, typer.Option(help=f"with commas between: {', '.join(registry.NAMES)}; N: every legal TP")] = "nitsum,oracle",
    scale: Annotated[float, typer.Option(help="multiplies every rate")] = 1.0,
    profile: Annotated[Path | None, typer.Option(help="step times; default: the shipped profile of model and GPU")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
    report_path: Annotated[Path | None, typer.Option("--report", help="where to write a page with pictures of them")] = None,
) -> None:
    """Replays traffic against a pool and says what goodput each policy would give."""
    if not 0 < scale <= 1e6:
        raise InvalidSpec("scale", f"{scale} must be above 0 and at most 1000000")
    for option, path in (("json", json_path), ("report", report_path)):
        if path is not None and not path.parent.is_dir():
            raise InvalidSpec(option, f"there is no folder {path.parent}")
    if report_path is not None:
        report.check()
    pool, model = read_pool(pool_path)
    spec = workload.parse(files.load_yaml(workload_path), tuple(t.name for t in pool.tiers))
    types = hardware.gpu_types(fleet)
    hardware.fleet(fleet, pool.model, ())  # before a profile is looked for: a fleet that is no fleet
    times = read_profile(profile, pool, types)
    nodes = hardware.fleet(fleet, pool.model, times.tp_sizes)
    setting = registry.Setting(pool, nodes, times, times)
    if not setting.tps:
        raise InvalidSpec("spec.tensorParallel.allowed", f"none fits; the profile has {', '.join(map(str, times.tp_sizes))}")
    names = registry.expand(policy, setting)
    registry.check(names, setting)
    folder = workload_path.parent
    context = int(model.context_length or getattr(times, "context_length", 0) or 0)
    console = Console(stderr=True)
    with console.status("reading traces"):
        traffic = arrivals.build(spec, lambda path: files.lines(folder / path), seed, scale, context)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} s"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        tasks = {name: bar.add_task(name, total=spec.duration_s) for name in names}
        done = compare.run(names, setting, traffic, lambda name, at: bar.update(tasks[name], completed=min(at, spec.duration_s)))
        for name in names:
            bar.update(tasks[name], completed=spec.duration_s)
    figures = done.figures()
    document: dict[str, Any] = {
        "fleet": fleet,
        "pool": pool.name,
        "profile": {"name": times.name, "origin": times.origin, "note": times.note},
        "seed": seed,
        "scale": scale,
        "duration_s": spec.duration_s,
        "requests": len(traffic.requests),
        "notes": [*traffic.notes, *(() if context else ("no context length is known: no request is too long",))],
        "policies": figures,
    }
    if json_path is not None:
        files.write(json_path, json.dumps(document, indent=1) + "\n")
    if report_path is not None:
        files.write(report_path, report.page(done, document, spec, times))
    _show(figures, origin(times), document["notes"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _show(figures: dict[str, Any], step_times: str, notes: list[str]) -> None:
    tiers = list(next(iter(figures.values()))["tiers"])
    table = Table("policy", "goodput/s", "attained", *tiers, "offered/s", "refused", "too long", "flips", "GPUs", box=SIMPLE)
    for name, f in figures.items():
        goodput = "-" if f["goodput_rps"] is None else f"{f['goodput_rps']:.2f}"
        by_tier = [_percent(f["tiers"][t]["attainment"]) for t in tiers]
        counts = [str(f[k]) for k in ("refused", "too_long", "flips", "gpus_max")]
        table.add_row(name, goodput, _percent(f["attainment"]), *by_tier, f"{f['offered_rps']:.2f}", *counts)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(width=200)
    console.print(table)
    console.print(step_times, highlight=False, markup=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
