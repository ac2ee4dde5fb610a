"""Which cells `goodput.py` makes. What is still wanted follows from what is there, so a sweep may end at any time and go on later."""

from dataclasses import dataclass, replace

from goodput_cells import Point, Store, Unit
from goodput_mixes import MIXES, MODELS, setting

from nitsum.errors import InvalidSpec
from nitsum.sim.policies import registry

JUDGED = ("nitsum", "oracle")
"""By whose error more seeds are asked for; all policies of a point then get the same."""
LOWER = 0.6
"""Loads below the grid for a policy that does not even hold the lowest: each so much of the one before."""
FLIPS = ("nitsum@free", "nitsum@copy", "nitsum", "nitsum@1s", "nitsum@5s", "nitsum@15s", "nitsum@30s", "nitsum@60s")


def _can_be(name: str, s: registry.Setting) -> bool:
    try:
        registry.check((name,), s)
    except InvalidSpec:
        return False
    return True


@dataclass(frozen=True)
class Plan:
    title: str
    model: str
    gpus: int
    mixes: tuple[str, ...]
    loads: tuple[float, ...]
    policies: str
    """As `--policy` takes them."""
    duration_s: float
    seeds: tuple[int, int] = (1, 1)
    """Least and most."""
    error: float = 0.01
    """Standard error of the mean attainment at which no more seeds are asked for."""
    lower_max: int = 3
    """Loads below the grid at which to look for the highest that a policy holds."""

    def points(self, mix: str) -> tuple[Point, ...]:
        return tuple(Point(self.model, self.gpus, mix, load, self.duration_s) for load in self.loads)

    def names(self, mix: str) -> tuple[str, ...]:
        """Less those of `-tpN` that cannot be: a tier of its own for each replica needs as many replicas as tiers."""
        s = setting(MODELS[self.model], MIXES[mix], self.gpus)[0]
        return tuple(n for n in registry.expand(self.policies, s) if n in self.policies or _can_be(n, s))

    def lower(self, mix: str, name: str, store: Store) -> tuple[Point, ...]:
        """Loads below the grid that this policy was tried at, or should be next."""
        found: list[Point] = []
        load = min(self.loads)
        for _ in range(self.lower_max):
            last = Point(self.model, self.gpus, mix, load, self.duration_s)
            if not any(store.seeds(last, name)) or store.mean(last, name, "attainment") >= 0.99:
                break
            load = round(load * LOWER, 4)
            found.append(Point(self.model, self.gpus, mix, load, self.duration_s))
        return tuple(found)

    def wanted(self, store: Store) -> list[Unit]:
        """What is missing now; empty: all is there."""
        units = []
        for mix in self.mixes:
            names = self.names(mix)
            for point in self.points(mix):
                seeds = self.seeds[0]
                judged = [n for n in JUDGED if n in names] or list(names)
                while seeds < self.seeds[1] and all(store.get(point, seeds, n) for n in names):
                    if max(store.error(point, n) for n in judged) <= self.error:
                        break
                    seeds += 1
                units += [Unit(point, seed, names) for seed in range(1, seeds + 1)]
            units += [
                Unit(point, seed, (name,))
                for name in names
                for point in self.lower(mix, name, store)
                for seed in range(1, self.seeds[0] + 1)
            ]
        return [u for u in units if any(store.get(u.point, u.seed, n) is None for n in u.policies)]


EVERY = "plain-tpN,static-tpN,static-partition,static-pd,resplit-tpN,replicas-tpN,restart-tp,nitsum,oracle"
FEW = "plain-tp1,plain-tp2,static-tp2,static-partition,resplit-tp1,resplit-tp2,resplit-tp4,nitsum,oracle"
FEW_32B = "plain-tp2,plain-tp4,static-tp4,static-partition,resplit-tp2,resplit-tp4,nitsum,oracle"
LADDER = "plain-tpN,aware-tpN,apart,static-partition,restart-tp,nitsum"


def plans(quick: bool, short: bool = False, exactly: int | None = None) -> tuple[tuple[Plan, ...], Plan, Plan]:
    """(the tables, break-even, the ladder). `exactly`: seeds."""
    mixes, grid = tuple(MIXES), (0.7, 1.0, 1.3)
    if short:
        few = {"Llama-3.1-8B": FEW, "Qwen3-32B": FEW_32B}
        seeds, duration_s, flips = (1, 1), 300.0, ",".join((*FLIPS, "static-partition", "resplit-tpN"))
        tables: tuple[Plan, ...] = tuple(Plan("8 H100", model, 8, mixes, grid, few[model], duration_s) for model in few)
        tables += tuple(Plan("64 H100", model, 64, mixes[:4], (1.0,), few[model], 60.0, lower_max=0) for model in few)
    elif quick:
        tables = (Plan("8 H100", "Llama-3.1-8B", 8, mixes[1:5], (0.7, 1.0), FEW, 60.0, lower_max=1),)
        seeds, duration_s, flips = (1, 1), 60.0, "nitsum@free,nitsum,nitsum@5s,nitsum@60s,static-partition"
    else:
        tables = tuple(Plan("8 H100", model, 8, mixes, grid, EVERY, 300.0, (2, 4)) for model in ("Llama-3.1-8B", "Qwen3-32B"))
        few = {"Llama-3.1-8B": FEW, "Qwen3-32B": FEW_32B}
        tables += tuple(Plan("64 H100", model, 64, mixes[:4], grid, few[model], 60.0, (2, 4)) for model in few)
        seeds, duration_s, flips = (2, 4), 300.0, ",".join((*FLIPS, "static-partition", "resplit-tpN"))
    if exactly is not None:
        seeds = exactly, exactly
        tables = tuple(replace(t, seeds=seeds) for t in tables)
    even = Plan(
        "Break-even", "Llama-3.1-8B", 8, ("fast+bulk", "all four")[: 1 if quick else 2], (1.0,), flips, duration_s, seeds, lower_max=0
    )
    ladder = Plan("The ladder", "Qwen3-14B", 8, ("chat+long",) if quick else mixes, (1.0,), LADDER, duration_s, seeds, lower_max=0)
    return tables, even, ladder


def part_of(tables: tuple[Plan, ...], mixes: list[str], gpus: int | None, duration_s: float | None) -> tuple[Plan, ...]:
    """Tables of these mixes and fleets alone; where cells shall last otherwise, without the loads below the grid."""
    found = [replace(t, mixes=tuple(m for m in t.mixes if m in mixes)) for t in tables if gpus in (None, t.gpus)]
    if duration_s is not None:
        found = [replace(t, duration_s=duration_s, lower_max=0) for t in found]
    return tuple(t for t in found if t.mixes)
