"""Mooncake's traces (FAST'25; Apache-2.0): JSON lines `timestamp` (ms), `input_length`, `output_length`, `hash_ids`.

The published conversation trace has one timestamp per 3 s tick. Replayed as it is, hundreds of requests would arrive at one instant that
never did; they are spread evenly at random over their tick, which the result declares. Prefix blocks (`hash_ids`) are not simulated.
"""

from collections.abc import Iterable

import numpy as np

from nitsum.sim.traces import LEGAL, Problems, Trace, make

TICK_MS_MIN = 1000
"""Timestamps on a coarser grid than this are ticks."""


def parse(lines: Iterable[str], name: str, rng: np.random.Generator) -> Trace:
    """Raises InvalidSpec that names the file and line."""
    problems = Problems(name, f"A line is an object with timestamp, input_length and output_length. {LEGAL}")
    at: list[int] = []
    prompt: list[int] = []
    output: list[int] = []
    last = 0
    for number, row in problems.objects(lines):
        ms = problems.whole(row.get("timestamp"), "timestamp", number)
        if 0 <= ms < last:
            problems.add("an unsorted timestamp", number)
        last = ms if ms >= 0 else last
        at.append(ms)
        prompt.append(problems.whole(row.get("input_length"), "input_length", number))
        output.append(problems.whole(row.get("output_length"), "output_length", number))
    problems.check(len(at))
    ms_at = np.asarray(at, dtype=np.float64)
    distinct = np.unique(ms_at)
    tick = float(np.median(np.diff(distinct))) if len(distinct) > 1 else 0.0
    if tick < TICK_MS_MIN or len(distinct) == len(at):
        return make(name, [t / 1e3 for t in at], prompt, output)
    order = np.argsort(spread := ms_at + rng.uniform(0, tick, len(at)), kind="stable")
    note = f"{name}: timestamps are ticks of {tick / 1e3:g} s; requests are spread over their tick at random"
    return make(name, list(spread[order] / 1e3), [prompt[i] for i in order], [output[i] for i in order], (note,))
