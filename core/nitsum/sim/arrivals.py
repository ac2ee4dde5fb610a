"""From streams to requests. The same seed gives the same requests, whatever the policy. Time is never compressed: a trace below its
recorded rate is thinned, above it rotations of itself, at random offsets, are laid over it.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nitsum.errors import InvalidSpec
from nitsum.sim.request import Request
from nitsum.sim.traces import Floats, Ints, Trace, azure, mooncake, servegen
from nitsum.sim.workload import Length, StreamSpec, Synthetic, TraceSource, Workload

Lines = Callable[[str], Iterable[str]]
"""Text lines of the file at a path as the workload wrote it."""
REQUESTS_MAX = 20_000_000
Columns = tuple[Floats, Ints, Ints]


@dataclass(frozen=True)
class Traffic:
    """Requests by arrival. `too_long`: beyond the model's context, left out, by tier."""

    duration_s: float
    requests: tuple[Request, ...]
    too_long: dict[str, int]
    notes: tuple[str, ...]


def window(trace: Trace, start_s: float, duration_s: float) -> Columns:
    """The stretch [start, start + duration) of the trace, which begins again at its end."""
    at, prompt, output = [], [], []
    for turn in range(int(start_s // trace.length_s), int((start_s + duration_s) // trace.length_s) + 1):
        times = trace.at + turn * trace.length_s - start_s
        inside = (times >= 0) & (times < duration_s)
        at.append(times[inside])
        prompt.append(trace.prompt[inside])
        output.append(trace.output[inside])
    return np.concatenate(at), np.concatenate(prompt), np.concatenate(output)


def _thin(columns: Columns, keep: float, rng: np.random.Generator) -> Columns:
    chosen = rng.uniform(size=len(columns[0])) < keep
    return columns[0][chosen], columns[1][chosen], columns[2][chosen]


def at_rate(trace: Trace, start_s: float, duration_s: float, rate: float | None, scale: float, rng: np.random.Generator) -> Columns:
    base = window(trace, start_s, duration_s)
    recorded = len(base[0]) / duration_s
    wanted = (recorded if rate is None else rate) * scale
    if wanted == recorded:
        return base
    if wanted < recorded:
        return _thin(base, wanted / recorded, rng)
    layers = [base]
    copies = (wanted - recorded) / trace.rate
    for i in range(math.ceil(copies)):
        layer = window(trace, float(rng.uniform(0, trace.length_s)), duration_s)
        layers.append(layer if i < math.floor(copies) else _thin(layer, copies - math.floor(copies), rng))
    at, prompt, output = (np.concatenate(c) for c in zip(*layers, strict=True))
    order = np.argsort(at, kind="stable")
    return at[order], prompt[order], output[order]


def _draw(length: Length, n: int, rng: np.random.Generator) -> Ints:
    if not length.cv:
        return np.full(n, max(round(length.mean), 1), dtype=np.int64)
    sigma2 = math.log(1 + length.cv**2)
    drawn = rng.lognormal(math.log(length.mean) - sigma2 / 2, math.sqrt(sigma2), n)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


def synthetic(spec: Synthetic, duration_s: float, rate: float, rng: np.random.Generator) -> Columns:
    if spec.cv:
        at = servegen.renewals(duration_s, rate, "Gamma", 1 / spec.cv**2, rng)
    else:
        at = (np.arange(math.floor(duration_s * rate)) + 0.5) / rate if rate else np.empty(0)
    return at, _draw(spec.prompt, len(at), rng), _draw(spec.output, len(at), rng)


def _columns(
    stream: StreamSpec, workload: Workload, scale: float, rng: np.random.Generator, file_rng: np.random.Generator, lines: Lines
) -> tuple[Columns, list[str]]:
    start, duration = workload.start_s, workload.duration_s
    if isinstance(stream.source, Synthetic):
        assert stream.rate is not None
        return synthetic(stream.source, duration, stream.rate * scale, rng), []
    source = stream.source
    name = source.path
    notes: list[str] = []
    if source.format == "servegen":
        parameters = servegen.parse(lines(name), name)
        recorded = parameters.mean_rate(start, duration)
        if stream.rate and not recorded:
            raise InvalidSpec(
                f"{stream.path}.rate", f"{name} has no requests in the simulated stretch, so nothing to scale to {stream.rate}"
            )
        factor = scale * (1.0 if stream.rate is None else stream.rate / recorded if stream.rate else 0.0)
        columns, length_s = parameters.draw(start, duration, factor, rng), parameters.length_s
    else:
        trace = azure.parse(lines(name), name) if source.format == "azure" else mooncake.parse(lines(name), name, file_rng)
        columns, length_s = at_rate(trace, start, duration, stream.rate, scale, rng), trace.length_s
        notes += trace.notes
    if start + duration > length_s:
        notes.append(f"{name}: lasts {length_s:.0f} s; the workload asks for {start:g} s to {start + duration:g} s, so it begins again")
    return columns, notes


def _expected(stream: StreamSpec, workload: Workload, scale: float) -> None:
    if stream.rate is not None and stream.rate * scale * workload.duration_s > REQUESTS_MAX:
        raise InvalidSpec(f"{stream.path}.rate", f"more than {REQUESTS_MAX} requests; lower the rate, the scale or the duration")


def build(workload: Workload, lines: Lines, seed: int, scale: float = 1.0, context_length: int = 0) -> Traffic:
    """Raises InvalidSpec. `context_length` 0: not limited."""
    rows: list[tuple[float, int, str, int, int, int]] = []
    too_long: Counter[str] = Counter()
    notes: list[str] = []
    for i, stream in enumerate(workload.streams):
        _expected(stream, workload, scale)
        rng = np.random.default_rng([seed, i])
        # How ticks are spread depends on the file alone: two streams of one trace see the same recording.
        file = zlib.crc32(stream.source.path.encode()) if isinstance(stream.source, TraceSource) else 0
        (at, prompt, output), said = _columns(stream, workload, scale, rng, np.random.default_rng([seed, file, 1]), lines)
        notes += said
        if stream.max_tokens is not None:
            cut = int((output > stream.max_tokens).sum())
            if cut:
                notes.append(f"{stream.path}: {cut} output(s) end at max_tokens {stream.max_tokens}")
            output = np.minimum(output, stream.max_tokens)
        limit = stream.max_tokens or 1 << max(int(output.max(initial=1)) - 1, 1).bit_length()
        fits = (prompt + output <= context_length) if context_length else np.ones(len(at), dtype=bool)
        too_long[stream.tier] += int((~fits).sum())
        for a, p, o in zip(at[fits].tolist(), prompt[fits].tolist(), output[fits].tolist(), strict=True):
            most = min(limit, context_length - p) if context_length else limit
            rows.append((a, i, stream.tier, p, o, max(most, o)))
    if len(rows) > REQUESTS_MAX:
        raise InvalidSpec("streams", f"{len(rows)} requests are more than {REQUESTS_MAX}; lower rates, scale or duration")
    rows.sort()
    requests = tuple(Request(n, tier, a, p, o, m) for n, (a, _, tier, p, o, m) in enumerate(rows))
    return Traffic(workload.duration_s, requests, {t: n for t, n in sorted(too_long.items()) if n}, tuple(dict.fromkeys(notes)))
