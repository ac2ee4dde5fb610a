"""One simulation each: a file of results per cell, so that a sweep that was cut off goes on where it was.

Files lie in a folder named by a digest of the code that made them (core, profiles, mixes): results of other code are never mixed in.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import goodput_mixes
from goodput_mixes import MIXES, MODELS

import nitsum
from nitsum.sim import compare
from nitsum.sim.result import RunResult


@dataclass(frozen=True, order=True)
class Point:
    """What all policies are compared at."""

    model: str
    gpus: int
    mix: str
    load: float
    duration_s: float

    @property
    def rate(self) -> float:
        """requests/s."""
        return self.load * MODELS[self.model].rates[self.mix] * self.gpus / 8


@dataclass(frozen=True, order=True)
class Unit:
    """A piece of work: traffic is made once for its policies."""

    point: Point
    seed: int
    policies: tuple[str, ...]


@cache
def digest() -> str:
    files = sorted(f for f in Path(nitsum.__file__).parent.rglob("*") if f.suffix in (".py", ".json"))
    found = hashlib.sha256()
    for f in (*files, Path(goodput_mixes.__file__)):
        found.update(f.read_bytes())
    return found.hexdigest()[:12]


class Store:
    def __init__(self, folder: Path, traces: Path | None) -> None:
        self.folder = folder / f"{digest()}-{'traces' if traces else 'synthetic'}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[Path, dict[str, Any]] = {}

    def path(self, p: Point, seed: int, policy: str) -> Path:
        name = f"{p.model}_{p.gpus}_{p.mix}_{p.duration_s:g}s_{p.load:g}_{seed}_{policy}.json"
        return self.folder / name.replace(" ", "-").replace("/", "-")

    def get(self, p: Point, seed: int, policy: str) -> dict[str, Any] | None:
        path = self.path(p, seed, policy)
        if path not in self.known:
            if not path.is_file():
                return None
            self.known[path] = json.loads(path.read_text())
        return self.known[path]

    def put(self, p: Point, seed: int, policy: str, figures: dict[str, Any]) -> None:
        path = self.path(p, seed, policy)
        whole = path.with_suffix(".part")  # a file that is there is whole
        whole.write_text(json.dumps(figures) + "\n")
        whole.rename(path)

    def seeds(self, p: Point, policy: str) -> Iterator[dict[str, Any]]:
        seed = 1
        while (found := self.get(p, seed, policy)) is not None:
            yield found
            seed += 1

    def mean(self, p: Point, policy: str, what: str) -> float:
        """Over the seeds that there are; raises where there is none."""
        return statistics.fmean(f[what] for f in self.seeds(p, policy))

    def error(self, p: Point, policy: str) -> float:
        """Standard error of the mean attainment; infinite with fewer than two seeds."""
        values = [f["attainment"] for f in self.seeds(p, policy)]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def run(unit: Unit, store: Store, traces: Path | None, said: Callable[[str], None] = lambda _: None) -> int:
    """Cells that were made; those that are there are left as they are."""
    todo = [name for name in unit.policies if store.get(unit.point, unit.seed, name) is None]
    if not todo:
        return 0
    p = unit.point
    model, mix = MODELS[p.model], MIXES[p.mix]
    setting, times = goodput_mixes.setting(model, mix, p.gpus)
    sent = goodput_mixes.traffic(p.rate, mix, p.duration_s, unit.seed, times.context_length, traces)
    known: dict[str, RunResult] = {}
    for name in todo:
        said(f"{p.model}, {p.gpus} GPUs, {p.mix}, load {p.load:g}, seed {unit.seed}: {name}")
        began = time.process_time()
        compared = compare.run((name,), setting, sent, known=known)
        known |= compared.results
        figures = compared.figures()[name]
        store.put(p, unit.seed, name, figures | {"cpu_s": round(time.process_time() - began, 2)})
    return len(todo)
