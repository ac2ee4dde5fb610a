"""Goodput of every policy over mixes of recorded traces, loads and seeds: simulated, so every figure is modelled.

usage: uv run python bench/goodput.py [--quick | --short] [--seeds N] [--traces DIR] [--jobs N] [--only tables,even,ladder] [--json FILE]
       [--markdown] [--seconds S] [--mixes M,...] [--gpus N]

`--seconds`, `--mixes` and `--gpus` ask for a part of the tables, longer than the sweep has time for; no loads below the grid then.

The traces lie outside the repository: `--traces`, or NITSUM_TRACES. Results of single cells are kept under `--results`; a sweep that was
cut off goes on there. Seeds are added until the standard error of nitsum's and the oracle's mean attainment is at most 1 %, four at most.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import goodput_cells
import goodput_markdown
import goodput_mixes
import goodput_tables
from goodput_cells import Store, Unit
from goodput_plans import Plan, part_of, plans
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PARTS = ("tables", "even", "ladder")


def _one(unit: Unit, folder: Path, traces: Path | None) -> Unit:
    """In a process of its own."""
    goodput_cells.run(unit, Store(folder, traces), traces)
    return unit


def make(todo: list[Plan], store: Store, folder: Path, traces: Path | None, jobs: int) -> None:
    """All cells that the plans want, in rounds: what a round shows may ask for more seeds or lower loads."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, ProcessPoolExecutor(jobs) as workers:
        while units := [u for plan in todo for u in plan.wanted(store)]:
            task = bar.add_task("", total=len(units))
            for done in as_completed([workers.submit(_one, u, folder, traces) for u in units]):
                u = done.result()
                what = f"{u.point.model}, {u.point.gpus} GPUs, {u.point.mix}, load {u.point.load:g}, seed {u.seed}"
                bar.update(task, advance=1, description=what)
                if not console.is_terminal:  # a log has no bar
                    print(f"{bar.tasks[task].completed:.0f}/{len(units)}  {what}", file=sys.stderr, flush=True)


def _known(options: argparse.ArgumentParser, flag: str, names: list[str], legal: Collection[str]) -> list[str]:
    if wrong := [n for n in names if n not in legal]:
        options.error(f"{flag}: {wrong[0]!r} is not one of {', '.join(legal)}")
    return names


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="one model, four mixes, two loads, a minute each, one seed")
    options.add_argument("--short", action="store_true", help="all mixes at three loads, 64 GPUs at one, fewer policies, one seed")
    options.add_argument("--seeds", type=int, metavar="N", help="exactly so many, whatever the error")
    options.add_argument(
        "--traces", type=Path, default=os.environ.get("NITSUM_TRACES"), metavar="DIR", help="folder of the recorded traces"
    )
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "out" / "goodput", metavar="DIR")
    options.add_argument("--jobs", type=int, default=1, help="processes")
    options.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    options.add_argument("--seconds", type=float, metavar="S", help="of each cell of the tables, instead of the sweep's")
    options.add_argument("--mixes", metavar="M,...", help=f"tables of these mixes alone; of {', '.join(goodput_mixes.MIXES)}")
    options.add_argument("--gpus", type=int, metavar="N", help="tables of fleets of so many GPUs alone")
    options.add_argument("--json", type=Path, metavar="FILE")
    options.add_argument("--markdown", action="store_true", help="also print the tables as docs/benchmarks.md has them")
    args = options.parse_args()
    parts = _known(options, "--only", args.only.split(","), PARTS)
    traces = args.traces
    if absent := goodput_mixes.missing(traces):
        where = f"{traces} lacks {', '.join(absent)}" if traces else "neither --traces nor NITSUM_TRACES says where the recorded traces are"
        print(f"NO TRACES: {where}; synthetic requests of the same mean lengths, Poisson, stand in for all of them", file=sys.stderr)
        traces = None
    origin = "recorded traces" if traces else "SYNTHETIC TRAFFIC"
    tables, even, ladder = plans(args.quick, args.short, args.seeds)
    mixes = _known(options, "--mixes", args.mixes.split(",") if args.mixes else list(goodput_mixes.MIXES), goodput_mixes.MIXES)
    tables = part_of(tables, mixes, args.gpus, args.seconds)
    if not tables:
        options.error("--mixes, --gpus: no table is left")
    todo = [*(tables if "tables" in parts else ()), *([even] if "even" in parts else ()), *([ladder] if "ladder" in parts else ())]
    store = Store(args.results, traces)
    make(todo, store, args.results, traces, args.jobs)
    console = Console(width=None if Console().is_terminal else 200)
    document: dict[str, Any] = {
        "origin": "modelled",
        "traffic": origin,
        "code": goodput_cells.digest(),
        "quick": args.quick,
        "short": args.short,
    }
    if "tables" in parts:
        found = [(plan, mix, goodput_tables.table_of(plan, mix, store)) for plan in tables for mix in plan.mixes]
        for plan, mix, data in found:
            console.print(goodput_tables.show(plan, mix, data, origin))
        console.print(goodput_tables.summary(found))
        if args.markdown:
            print(goodput_markdown.ratios(tables, store), goodput_markdown.loads(tables, store), sep="\n\n")
        document["tables"] = [{"model": p.model, "gpus": p.gpus, "mix": mix, "duration_s": p.duration_s} | data for p, mix, data in found]
    for part, plan, of in (("even", even, goodput_tables.even), ("ladder", ladder, goodput_tables.ladder)):
        if part in parts:
            document[part], table = of(plan, store)  # type: ignore[operator]
            console.print(table)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
