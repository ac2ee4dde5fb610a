"""ServeGen (arXiv 2505.09999; Apache-2.0): traffic as parameters. One JSON line per client: ten-minute windows
`start_s,rate,cv,family,shape,scale` and, per six hours, empirical distributions of prompt and output length.

Gaps between a client's arrivals are Gamma or Weibull with the window's shape, scaled so that its recorded rate holds. Each window is a
stationary renewal process (its first gap is a residual one), so that counts are right on average for bursty and rare clients too.
"""

import ast
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitsum.sim.traces import Floats, Ints, Problems

COLUMNS = ["window_start_s", "rate_rps", "cv", "pattern", "arg1", "arg2"]
FAMILIES = ("Gamma", "Weibull")
MOST = 1e9
"""What is not below it is no time, rate, shape or length."""
LEGAL = (
    f"A line is a client: trace, a list of {','.join(COLUMNS)} with rising starts and numbers of at least 0; dataset, by first second"
    " input_tokens and output_tokens, Python dicts of length: probability"
)


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


def _number(text: str, column: str, problems: Problems, line: int, at: str) -> float:
    """Of at least 0; NaN and a problem where there is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < MOST:
        problems.add(f"a {column} that is not a number" if text else f"no {column}", line, at, "window")
        return math.nan
    if value < 0:
        problems.add(f"a negative {column}", line, at, "window")
        return math.nan
    return value


def _window(text: Any, problems: Problems, line: int, at: str) -> Window | None:
    """None and problems where it is none."""
    fields = [f.strip() for f in text.split(",")] if isinstance(text, str) else []
    if len(fields) != len(COLUMNS):
        problems.add(f"{len(fields)} instead of {len(COLUMNS)} columns" if fields else "no text", line, at, "window")
        return None
    start, rate = (_number(fields[i], COLUMNS[i], problems, line, at) for i in (0, 1))
    shape = _number(fields[4], COLUMNS[4], problems, line, at) if rate or fields[4] else 0.0
    if rate > 0 and fields[3] not in FAMILIES:
        problems.add(f"a {COLUMNS[3]} that is not one of {', '.join(FAMILIES)}", line, at, "window")
    if rate > 0 and shape == 0:
        problems.add(f"an {COLUMNS[4]} (the shape) of 0", line, at, "window")
    return None if math.isnan(start) else Window(start, rate, fields[3], shape)


def _lengths(text: Any, problems: Problems, line: int, at: str) -> Lengths | None:
    """None and a problem where it is none."""
    try:
        pdf = ast.literal_eval(text) if isinstance(text, str) else text
        values, weights = (np.asarray([float(x) for x in of], dtype=np.float64) for of in (pdf.keys(), pdf.values()))
    except (ValueError, SyntaxError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError):
        problems.add("text that is not a Python dict of length: probability", line, at, "distribution")
        return None
    kinds = {
        "lengths that are negative or not whole": not ((values >= 0) & (values < MOST) & (values == np.floor(values))).all(),
        "probabilities that are negative or not numbers": not ((weights >= 0) & (weights < MOST)).all(),
        "no probability above 0": not (weights > 0).any(),
    }
    for kind in (found := [kind for kind, wrong in kinds.items() if wrong]):
        problems.add(kind, line, at, "distribution")
    return None if found else Lengths(values.astype(np.int64), np.cumsum(weights))


def _stretches(dataset: dict[str, Any], asked: bool, problems: Problems, line: int) -> list[tuple[float, Lengths, Lengths]]:
    """Lengths by the second from which they hold, in order. `asked`: there must be some."""
    found, silent = [], 0
    for key, pdfs in dataset.items():
        at = f"dataset.{key}"
        try:
            second = float(key)
        except ValueError:
            second = math.nan
        if not 0 <= second < MOST:
            problems.add("a name that is not its first second", line, at, "distribution")
        if not isinstance(pdfs, dict):
            problems.add("no input_tokens and output_tokens", line, at, "distribution")
            continue
        of = [pdfs.get(name) for name in ("input_tokens", "output_tokens")]
        if all(pdf in ("{}", {}, "", None) for pdf in of):
            silent += 1
            continue  # a stretch without requests has no lengths either
        prompt, output = (
            _lengths(pdf, problems, line, f"{at}.{name}") for pdf, name in zip(of, ("input_tokens", "output_tokens"), strict=True)
        )
        if prompt and output:
            found.append((second, prompt, output))
    if asked and silent == len(dataset):
        problems.add("no lengths in dataset, though the client has requests", line)
    return sorted(found, key=lambda x: x[0])


def parse(lines: Iterable[str], name: str) -> Parameters:
    """Windows without requests are legal. Raises InvalidSpec that names the file, lines and fields, with counts."""
    problems, clients, starts = Problems(name, LEGAL), [], set[float]()
    for line, row in problems.objects(lines):
        if row.get("trace_columns", COLUMNS) != COLUMNS:
            problems.add("other trace_columns", line)
        traced, dataset = row.get("trace"), row.get("dataset")
        if not isinstance(traced, list) or not traced:
            problems.add("no trace (a list)", line)
            traced = []
        if not isinstance(dataset, dict) or not dataset:
            problems.add("no dataset (a dict)", line)
            continue
        windows: list[Window] = []
        for i, text in enumerate(traced):
            if (w := _window(text, problems, line, at := f"trace[{i}]")) is not None:
                if windows and w.start_s <= windows[-1].start_s:
                    problems.add(f"an unsorted {COLUMNS[0]}", line, at, "window")
                windows.append(w)
        lengths = _stretches(dataset, any(w.rate > 0 for w in windows), problems, line)
        starts |= {w.start_s for w in windows}
        clients.append(Client(tuple(windows), tuple(lengths)))
    problems.check(len(clients))
    ordered = sorted(starts)
    window_s = min((b - a for a, b in itertools.pairwise(ordered)), default=600.0)
    return Parameters(name, tuple(clients), window_s, ordered[-1] + window_s)
