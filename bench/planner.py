"""How long a plan takes, one core: the slow plane (exact and greedy alone), the fast plane. Eight tiers, drifting demand.

`uv run python bench/planner.py [--quick] [--json FILE]`. CPU time, so that other work on the machine counts less; still read the ratios.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from nitsum.demand import TierDemand
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, PlannerSettings, Snapshot
from nitsum.planner.fast import FastPlane
from nitsum.planner.slow import SlowPlane
from nitsum.planner.types import Planner
from nitsum.pool import Pool, Tier
from nitsum.topology import Gpu, Node

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
PROFILE = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = tuple(Tier(f"t{i}", 300 * (i + 1), 12.0 * (i + 1), weight=8 - i) for i in range(8))


def fleet(gpus: int) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(Node(f"a{i}", tuple(Gpu(j, f"a{i}-{j}", "h100_sxm") for j in range(8)), legal_tp={MODEL: (1, 2, 4, 8)}), reported_at=0.0)
        for i in range(gpus // 8)
    )


def snapshot(gpus: int, nodes: tuple[NodeView, ...], turn: int) -> Snapshot:
    pool = Pool("default/bench", "u", MODEL, TIERS, gpus)
    demand = tuple(
        TierDemand(
            pool.name, t.name, (0.2 + (7 * turn + 11 * j) % 13 / 60) * gpus, 0.1, 1.0, 1000 + 2 * turn, 2000, 200, 400, observed_at=0.0
        )
        for j, t in enumerate(TIERS)
    )
    return Snapshot((pool,), nodes, demand, {pool.name: PROFILE}, {pool.name: PROFILE}, PlannerSettings())


def measure(planner: Planner, gpus: int, turns: int) -> dict[str, float]:
    """Milliseconds of CPU: the first plan, and median and 99th percentile of the later ones."""
    nodes = fleet(gpus)
    took: list[float] = []
    first = SlowPlane(use_exact=False)(snapshot(gpus, nodes, 0), 0.0)
    nodes = tuple(replace(n, residency=w.residency, layout=w.layout) for n in nodes if (w := first.node(n.node.agent_id)))
    for turn in range(turns + 1):
        taken = snapshot(gpus, nodes, turn)
        began = time.process_time()
        planner(taken, 0.0)
        took.append((time.process_time() - began) * 1e3)
    later = sorted(took[1:])
    return {"first_ms": took[0], "p50_ms": statistics.median(later), "p99_ms": later[min(int(len(later) * 0.99), len(later) - 1)]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer sizes and turns")
    options.add_argument("--json", type=Path, metavar="FILE")
    args = options.parse_args()
    sizes, turns = ((64, 128), 10) if args.quick else ((64, 128, 1024, 10_000), 30)
    planners: dict[str, Planner] = {
        "slow plane, exact": SlowPlane(),
        "slow plane, greedy": SlowPlane(use_exact=False),
        "fast plane": FastPlane(),
    }
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, gpus in track([(n, g) for n in planners for g in sizes], "planning", console=Console(stderr=True)):
        figures.setdefault(name, {})[str(gpus)] = measure(planners[name], gpus, turns if gpus <= 1024 else 3)
    table = Table(
        "planner",
        *(f"{g} GPUs: first / p50 / p99 ms" for g in sizes),
        title=f"measured, one core, {platform.processor() or platform.machine()}",
    )
    for name, row in figures.items():
        table.add_row(name, *("{first_ms:.1f} / {p50_ms:.1f} / {p99_ms:.1f}".format(**row[str(g)]) for g in sizes))
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({"python": platform.python_version(), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
