"""ServeGen (arXiv 2505.09999; Apache-2.0): traffic as parameters. One JSON line per client: ten-minute windows
`start_s,rate,cv,family,shape,scale` and, per six hours, empirical distributions of prompt and output length.

Gaps between a client's arrivals are Gamma or Weibull with the window's shape, scaled so that its recorded rate holds. Each window is a
stationary renewal process (its first gap is a residual one), so that counts are right on average for bursty and rare clients too.
"""

import ast
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitsum.errors import InvalidSpec
from nitsum.sim.traces import Floats, Ints, Problems

COLUMNS = ["window_start_s", "rate_rps", "cv", "pattern", "arg1", "arg2"]
FAMILIES = ("Gamma", "Weibull")


@dataclass(frozen=True)
class Window:
    start_s: float
    rate: float
    family: str
    shape: float


@dataclass(frozen=True)
class Lengths:
    """Values with their cumulated probabilities."""

    values: Ints
    cumulated: Floats

    def draw(self, n: int, rng: np.random.Generator) -> Ints:
        found = np.searchsorted(self.cumulated, rng.uniform(0, self.cumulated[-1], n), side="right")
        return np.maximum(self.values[np.minimum(found, len(self.values) - 1)], 1)


@dataclass(frozen=True)
class Client:
    windows: tuple[Window, ...]
    lengths: tuple[tuple[float, Lengths, Lengths], ...]
    """(from second, prompt, output), in order."""


@dataclass(frozen=True)
class Parameters:
    """All clients of one file. `length_s`: where it begins again."""

    name: str
    clients: tuple[Client, ...]
    window_s: float
    length_s: float

    def mean_rate(self, start_s: float, duration_s: float) -> float:
        """Recorded requests/s over a stretch, which may wrap around."""
        return sum(w.rate * (b - a) for c in self.clients for a, b, w in self._pieces(c, start_s, duration_s)) / duration_s

    def _pieces(self, client: Client, start_s: float, duration_s: float) -> Iterable[tuple[float, float, Window]]:
        """(from, to, window) in seconds of the simulation."""
        for turn in range(int((start_s + duration_s) // self.length_s) + 1):
            for w in client.windows:
                a = max(w.start_s + turn * self.length_s - start_s, 0.0)
                b = min(w.start_s + self.window_s + turn * self.length_s - start_s, duration_s)
                if b > a:
                    yield a, b, w

    def draw(self, start_s: float, duration_s: float, factor: float, rng: np.random.Generator) -> tuple[Floats, Ints, Ints]:
        """Arrivals, prompts, outputs of a stretch with every rate multiplied by `factor`; sorted by arrival."""
        columns: list[tuple[Floats, Ints, Ints]] = []
        for client in self.clients:
            for a, b, w in self._pieces(client, start_s, duration_s):
                at = a + renewals(b - a, w.rate * factor, w.family, w.shape, rng)
                second = (start_s + a) % self.length_s
                _, prompt, output = next((x for x in reversed(client.lengths) if x[0] <= second), client.lengths[0])
                columns.append((at, prompt.draw(len(at), rng), output.draw(len(at), rng)))
        if not columns:
            return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
        at, prompts, outputs = (np.concatenate(c) for c in zip(*columns, strict=True))
        order = np.argsort(at, kind="stable")
        return at[order], prompts[order], outputs[order]


def renewals(duration_s: float, rate: float, family: str, shape: float, rng: np.random.Generator) -> Floats:
    """Times in [0, duration) of a stationary renewal process whose gaps have this family and shape and mean 1 / rate."""
    if rate <= 0:
        return np.empty(0)
    mean = 1 / rate
    if family == "Gamma":
        scale = mean / shape
        biased = scale * rng.gamma(shape + 1)
    else:
        scale = mean / math.gamma(1 + 1 / shape)
        biased = scale * rng.gamma(1 + 1 / shape) ** (1 / shape)
    now = biased * rng.uniform()  # from the origin to the first arrival: a uniform part of a length-biased gap
    parts = []
    while now < duration_s:
        n = max(int((duration_s - now) * rate * 1.1) + 8, 8)
        gaps = scale * (rng.gamma(shape, size=n) if family == "Gamma" else rng.weibull(shape, size=n))
        times = now + np.concatenate(([0.0], np.cumsum(gaps)))
        parts.append(times[:-1])
        now = float(times[-1])
    times = np.concatenate(parts) if parts else np.empty(0)
    return times[times < duration_s]


def _window(text: Any, where: str) -> Window:
    fields = [f.strip() for f in text.split(",")] if isinstance(text, str) else []
    if len(fields) != len(COLUMNS):
        raise InvalidSpec(where, f"must be {','.join(COLUMNS)}")
    try:
        start, rate = float(fields[0]), float(fields[1])
        shape = float(fields[4] or 0)
    except ValueError as e:
        raise InvalidSpec(where, f"{e}; all but the pattern are numbers") from e
    if not (start >= 0 and 0 <= rate < 1e9):
        raise InvalidSpec(where, f"start {fields[0]} and rate {fields[1]} must not be negative")
    if rate > 0 and fields[3] not in FAMILIES:
        raise InvalidSpec(where, f"pattern {fields[3]!r} is not one of {', '.join(FAMILIES)}")
    if rate > 0 and not shape > 0:
        raise InvalidSpec(where, f"arg1 (the shape) is {fields[4]}, must be above 0")
    return Window(start, rate, fields[3], shape)


def _lengths(text: Any, where: str) -> Lengths:
    try:
        pdf = ast.literal_eval(text) if isinstance(text, str) else text
        values = np.asarray([int(v) for v in pdf], dtype=np.int64)
        weights = np.asarray([float(p) for p in pdf.values()])
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError) as e:
        raise InvalidSpec(where, "must be a Python dict of length: probability") from e
    if not len(values) or (values < 0).any() or (weights < 0).any() or not weights.sum() > 0:
        raise InvalidSpec(where, "must hold lengths and probabilities that are not negative, and one probability above 0")
    return Lengths(values, np.cumsum(weights))


def parse(lines: Iterable[str], name: str) -> Parameters:
    """Windows without requests are legal. Raises InvalidSpec that names the file, line and field."""
    problems, clients, starts = Problems(name), [], set[float]()
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as e:
            problems.fail(number, f"not JSON: {e.msg}")
        if not isinstance(row, dict) or row.get("trace_columns", COLUMNS) != COLUMNS:
            problems.fail(number, f"must be an object whose trace_columns are {', '.join(COLUMNS)}")
        for key, kind in (("trace", list), ("dataset", dict)):
            if not isinstance(row.get(key), kind) or not row[key]:
                problems.fail(number, f"{key}: missing or empty; a client has trace (a list) and dataset (a dict)")
        at = f"{name}: line {number}"
        windows = tuple(_window(w, f"{at}: trace[{i}]") for i, w in enumerate(row["trace"]))
        for i in range(1, len(windows)):
            if windows[i].start_s <= windows[i - 1].start_s:
                problems.add("an unsorted window_start_s", number)
        lengths = []
        for key, pdfs in row["dataset"].items():
            where = f"{at}: dataset.{key}"
            if not isinstance(pdfs, dict):
                raise InvalidSpec(where, "must hold input_tokens and output_tokens")
            try:
                second = float(key)
            except ValueError as e:
                raise InvalidSpec(where, "must be named by its first second") from e
            # A stretch without requests has no lengths either.
            if pdfs.get("input_tokens") in ("{}", {}, "", None) and pdfs.get("output_tokens") in ("{}", {}, "", None):
                continue
            lengths.append(
                (
                    second,
                    _lengths(pdfs.get("input_tokens"), f"{where}.input_tokens"),
                    _lengths(pdfs.get("output_tokens"), f"{where}.output_tokens"),
                )
            )
        if any(w.rate > 0 for w in windows) and not lengths:
            raise InvalidSpec(f"{at}: dataset", "holds no lengths, though the client has requests")
        starts |= {w.start_s for w in windows}
        clients.append(Client(windows, tuple(sorted(lengths, key=lambda x: x[0]))))
    problems.check(len(clients))
    ordered = sorted(starts)
    window_s = min((b - a for a, b in itertools.pairwise(ordered)), default=600.0)
    return Parameters(name, tuple(clients), window_s, ordered[-1] + window_s)
