"""Recorded traffic: pure parsers over lines. What is wrong in a file is counted over all of it, then raised; never mended in silence."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import numpy as np

from nitsum.errors import InvalidSpec

FORMATS = ("azure", "mooncake", "servegen")
Floats: TypeAlias = Any
"""A numpy array of float64; numpy is not typed here."""
Ints: TypeAlias = Any


@dataclass(frozen=True)
class Trace:
    """Arrivals in seconds from the first one, sorted. `notes`: what a reader of any figure made from it must know."""

    name: str
    at: Floats
    prompt: Ints
    output: Ints
    length_s: float
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        return len(self.at) / self.length_s


LEGAL = "Times must not fall, lengths must be whole numbers of at least 0"


@dataclass
class Problems:
    """What is wrong with a file, by kind, with the first place of each. `legal`: the legal values."""

    name: str
    legal: str = LEGAL
    seen: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def add(self, kind: str, line: int, at: str = "", noun: str = "row") -> None:
        """`noun`: what has the problem, at `at` in its line."""
        kind = f"{noun}(s) with {kind}"
        count, first, where = self.seen.get(kind, (0, line, at))
        self.seen[kind] = count + 1, first, where

    def fail(self, line: int, message: str) -> NoReturn:
        """For what makes the rest of the file unreadable."""
        raise InvalidSpec(f"{self.name}: line {line}", message)

    def check(self, rows: int) -> None:
        """Raises InvalidSpec with every count."""
        if self.seen:
            ordered = sorted(self.seen.items(), key=lambda x: (x[1][1], x[0]))
            text = "; ".join(f"{n} {kind} (first: line {line}{at and ', '}{at})" for kind, (n, line, at) in ordered)
            raise InvalidSpec(f"{self.name}: line {ordered[0][1][1]}", f"{text}. {self.legal}")
        if not rows:
            raise InvalidSpec(self.name, "holds no requests")

    def objects(self, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, object) of JSON lines; those that are none are counted."""
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                self.add("text that is not JSON", number)
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                self.add("JSON that is not an object", number)

    def whole(self, text: object, what: str, line: int) -> int:
        """A count of tokens; -1 and a problem where there is none."""
        if text is None or text == "":
            self.add(f"no {what}", line)
            return -1
        try:
            value = float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = float("nan")
        if isinstance(text, bool) or value != value or value % 1 or abs(value) > 1e9:
            self.add(f"a {what} that is not a whole number", line)
            return -1
        if value < 0:
            self.add(f"a negative {what}", line)
        return int(value)


def make(name: str, at: list[float], prompt: list[int], output: list[int], notes: tuple[str, ...] = ()) -> Trace:
    """From parallel columns, times in seconds and sorted."""
    times = np.asarray(at, dtype=np.float64)
    times = times - times[0]
    prompts, outputs = np.asarray(prompt, dtype=np.int64), np.asarray(output, dtype=np.int64)
    for what, values in (("prompt", prompts), ("output", outputs)):
        if zeros := int((values == 0).sum()):
            notes = (*notes, f"{name}: {zeros} request(s) with an empty {what}, simulated as one token")
    # The last gap is as long as the mean one: N arrivals last N gaps, so that rotations keep the rate.
    gap = float(times[-1]) / max(len(times) - 1, 1) or 1.0
    return Trace(name, times, np.maximum(prompts, 1), np.maximum(outputs, 1), float(times[-1]) + gap, notes)
