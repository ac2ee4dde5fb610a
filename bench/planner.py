"""How long a plan takes, one core: its parts, the slow plane as a whole, the fast plane. Eight tiers, drifting rates and lengths, engines
that size their steps by TPOT, as in the operator.

`uv run python bench/planner.py [--quick] [--json FILE]`. CPU time, so that other work on the machine counts less; still read the ratios.

- question: what rates and lengths mean for capacities, kinds of groups and classes of nodes; capacities of new lengths are worked out.
- greedy, exact: from the question to counts of groups; exact begins from greedy's answer, whose time is in it.
- assignment: from counts to GPUs, with the least disturbance.
- slow plane: all of it, with the answers that the best one is compared with, labels, shares, limits and reasons; without exact: what an
  operator would wait for if HiGHS failed at once.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from nitsum.demand import TierDemand
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, PlannerSettings, Snapshot, exact, greedy
from nitsum.planner.capacity import Capacity
from nitsum.planner.fast import FastPlane
from nitsum.planner.joint import problem
from nitsum.planner.place import Slot, place
from nitsum.planner.problem import Counts, Problem
from nitsum.planner.question import ask
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.topology import Gpu, Node

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
PROFILE = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = tuple(Tier(f"t{i}", 300 * (i + 1), 12.0 * (i + 1), weight=8 - i) for i in range(8))
PARTS = ("question", "greedy", "exact", "assignment", "slow plane", "slow plane without exact", "fast plane")
T = TypeVar("T")
Took = dict[str, list[float]]


def fleet(gpus: int) -> tuple[NodeView, ...]:
    return tuple(
        NodeView(Node(f"a{i}", tuple(Gpu(j, f"a{i}-{j}", "h100_sxm") for j in range(8)), legal_tp={MODEL: (1, 2, 4, 8)}))
        for i in range(gpus // 8)
    )


def snapshot(gpus: int, nodes: tuple[NodeView, ...], turn: int) -> Snapshot:
    pool = Pool("default/bench", "u", MODEL, TIERS, gpus)
    demand = tuple(
        TierDemand(pool.name, t.name, rate, 0.1, 1.0, prompt, 0.8, 100 + 30 * j, 0.8, observed_at=0.0)
        for j, t in enumerate(TIERS)
        for rate, prompt in [((0.2 + (7 * turn + 11 * j) % 13 / 60) * gpus, 600 + 130 * j + 2 * turn)]
    )
    return Snapshot((pool,), nodes, demand, {pool.name: PROFILE}, {pool.name: PROFILE}, PlannerSettings())


class Timed:
    """CPU milliseconds by part."""

    def __init__(self) -> None:
        self.took: Took = {part: [] for part in PARTS}

    def __call__(self, part: str, do: Callable[[], T]) -> T:
        began = time.process_time()
        found = do()
        self.took[part].append((time.process_time() - began) * 1e3)
        return found


def _question(taken: Snapshot, capacity: Capacity) -> tuple[Problem, list[list[NodeView]], Counts]:
    return problem([ask(taken.pools[0], taken)], taken, capacity, frozenset())


def measure(gpus: int, turns: int) -> Took:
    nodes = fleet(gpus)
    first = SlowPlane(use_exact=False, governed=True)(snapshot(gpus, nodes, 0), 0.0)
    nodes = tuple(replace(n, residency=w.residency, layout=w.layout) for n in nodes if (w := first.node(n.node.agent_id)))
    capacity, timed = Capacity(governed=True), Timed()
    slow, without = SlowPlane(governed=True), SlowPlane(use_exact=False, governed=True)
    fast = FastPlane(Capacity(governed=True))
    running = {
        ("default/bench", n.node.agent_id, g.gpu_uuids, None): tuple(s.tier for s in g.shares) for n in nodes for g in n.layout.groups
    }
    for turn in range(turns + 1):
        taken = snapshot(gpus, nodes, turn)
        asked, members, _ = timed("question", partial(_question, taken, capacity))
        found = timed("greedy", partial(greedy.solve, asked))
        best = timed("exact", partial(exact.solve, asked, start=found)) or found
        timed.took["exact"][-1] += timed.took["greedy"][-1]
        slots = [Slot(k.pool, k.tp_size, k.tiers, n) for (_, i), n in best.counts.items() for k in [asked.kinds[i]]]
        timed("assignment", partial(place, slots, members[0], running))
        timed("slow plane", partial(slow, taken, 0.0))
        timed("slow plane without exact", partial(without, taken, 0.0))
        timed("fast plane", partial(fast, taken, 0.0))
    return timed.took


def figures(took: list[float]) -> dict[str, float]:
    """The first plan; median and 99th percentile (nearest rank) of the later ones."""
    later = sorted(took[1:])
    return {"first_ms": took[0], "p50_ms": statistics.median(later), "p99_ms": later[-(-len(later) * 99 // 100) - 1]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer sizes and turns")
    options.add_argument("--json", type=Path, metavar="FILE")
    args = options.parse_args()
    sizes, turns = ((128,), 100) if args.quick else ((128, 1024, 10_000), 100)
    found: dict[str, dict[str, dict[str, float]]] = {part: {} for part in PARTS}
    for gpus in track(sizes, "planning", console=Console(stderr=True)):
        for part, took in measure(gpus, turns if gpus <= 1024 else 30).items():
            found[part][str(gpus)] = figures(took)
    table = Table(
        "part",
        *(f"{g} GPUs: first / p50 / p99 ms" for g in sizes),
        title=f"measured, one core, {platform.processor() or platform.machine()}",
    )
    for name, row in found.items():
        table.add_row(name, *("{first_ms:.1f} / {p50_ms:.1f} / {p99_ms:.1f}".format(**row[str(g)]) for g in sizes))
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({"python": platform.python_version(), "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
