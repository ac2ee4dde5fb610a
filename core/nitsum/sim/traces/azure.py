"""AzurePublicDataset's LLM traces (Splitwise, ISCA'24; CC-BY-4.0): `TIMESTAMP,ContextTokens,GeneratedTokens`, one request a row."""

import csv
from collections.abc import Iterable
from datetime import datetime

from nitsum.sim.traces import Problems, Trace, make

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _seconds(text: str) -> float:
    """Of `2023-11-16 18:15:46.6805900` (seven decimals, which fromisoformat cuts) or `2024-05-10 00:00:00.009930+00:00`."""
    whole, _, rest = text.partition(".")
    digits = rest.rstrip("Z").partition("+")[0]
    return (datetime.fromisoformat(whole.rstrip("Z").partition("+")[0]) - datetime(2000, 1, 1)).total_seconds() + float(f"0.{digits or 0}")


def parse(lines: Iterable[str], name: str) -> Trace:
    """CRLF is legal. Raises InvalidSpec that names the file and line."""
    problems = Problems(name)
    rows = csv.reader(lines)
    header = next(rows, None)
    if header is None:
        problems.check(0)
        raise AssertionError
    header = [h.strip().lstrip("\ufeff") for h in header]
    missing = [c for c in COLUMNS if c not in header]
    if missing:
        problems.fail(1, f"no column {missing[0]}; the columns are {', '.join(COLUMNS)}")
    where = [header.index(c) for c in COLUMNS]
    at: list[float] = []
    prompt: list[int] = []
    output: list[int] = []
    for row in rows:
        line = rows.line_num
        if not row or row == [""]:
            continue
        if len(row) != len(header):
            problems.add(f"{len(row)} instead of {len(header)} columns", line)
            continue
        time, p, o = (row[i].strip() for i in where)
        try:
            second = _seconds(time)
        except ValueError:
            problems.add("no TIMESTAMP" if not time else "a TIMESTAMP that is not like 2023-11-16 18:15:46.6805900", line)
            continue
        if at and second < at[-1]:
            problems.add("an unsorted TIMESTAMP", line)
        at.append(second)
        prompt.append(problems.whole(p, "ContextTokens", line))
        output.append(problems.whole(o, "GeneratedTokens", line))
    problems.check(len(at))
    return make(name, at, prompt, output)
