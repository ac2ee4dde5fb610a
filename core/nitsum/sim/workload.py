"""workload.yaml as typed values: which tier gets which traffic. Reading files is the caller's work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nitsum.errors import InvalidSpec
from nitsum.quantity import duration_ms
from nitsum.sim.traces import FORMATS

MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class TraceSource:
    format: str
    path: str


@dataclass(frozen=True)
class Length:
    """cv 0: always the mean; else lognormal, rounded, at least 1."""

    mean: float
    cv: float = 0.0


@dataclass(frozen=True)
class Synthetic:
    """Gaps between arrivals are gamma with this cv: 1 is Poisson, 0 is a clock."""

    cv: float
    prompt: Length
    output: Length


@dataclass(frozen=True)
class StreamSpec:
    """`rate` None: as recorded. `max_tokens` None: the next power of two above the stream's longest output."""

    tier: str
    source: TraceSource | Synthetic
    rate: float | None
    max_tokens: int | None
    path: str


@dataclass(frozen=True)
class Workload:
    duration_s: float
    start_s: float
    streams: tuple[StreamSpec, ...]


def _mapping(value: Any, path: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidSpec(path, f"must be a mapping with {', '.join(known)}")
    if extra := [k for k in value if k not in known]:
        raise InvalidSpec(f"{path}.{extra[0]}" if path != "workload" else str(extra[0]), f"unknown field; known are {', '.join(known)}")
    return value


def _number(value: Any, path: str, low: float, high: float = 1e9, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or (above and value == low):
        raise InvalidSpec(path, f"{value!r} must be a number {'above' if above else 'of at least'} {low:g} and at most {high:g}")
    return float(value)


def _seconds(value: Any, path: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise InvalidSpec(path, f"{value!r} is not a duration; write {value:g}s, or another unit: 30m, 1h")
    if not isinstance(value, str):
        raise InvalidSpec(path, f"{value!r} is not a duration; write a number and a unit: 90s, 30m, 1h")
    return duration_ms(value, path) / 1e3


def _length(value: Any, path: str) -> Length:
    if isinstance(value, Mapping):
        found = _mapping(value, path, ("mean", "cv"))
        if "mean" not in found:
            raise InvalidSpec(f"{path}.mean", "missing; a length is a number of tokens or {mean, cv}")
        return Length(_number(found["mean"], f"{path}.mean", 1, MAX_TOKENS), _number(found.get("cv", 0.0), f"{path}.cv", 0, 10))
    return Length(_number(value, path, 1, MAX_TOKENS))


def _cv(value: Any, path: str) -> float:
    legal = "poisson, constant or {gamma: {cv: 2}}"
    if value in ("poisson", "constant"):
        return 1.0 if value == "poisson" else 0.0
    if not isinstance(value, Mapping) or list(value) != ["gamma"]:
        raise InvalidSpec(path, f"{value!r} is not one of {legal}")
    gamma = _mapping(value["gamma"], f"{path}.gamma", ("cv",))
    return _number(gamma.get("cv"), f"{path}.gamma.cv", 0, 20, above=True)


def _source(raw: Mapping[str, Any], path: str) -> TraceSource | Synthetic:
    if ("trace" in raw) == ("synthetic" in raw):
        raise InvalidSpec(path, "must have either trace or synthetic")
    if "trace" in raw:
        trace = _mapping(raw["trace"], f"{path}.trace", ("format", "path"))
        if trace.get("format") not in FORMATS:
            raise InvalidSpec(f"{path}.trace.format", f"{trace.get('format')!r} is not one of {', '.join(FORMATS)}")
        if not isinstance(trace.get("path"), str) or not trace["path"]:
            raise InvalidSpec(f"{path}.trace.path", "must be the path of a file, relative to the workload's own")
        return TraceSource(trace["format"], trace["path"])
    synthetic = _mapping(raw["synthetic"], f"{path}.synthetic", ("arrivals", "prompt", "output"))
    for key in ("arrivals", "prompt", "output"):
        if key not in synthetic:
            raise InvalidSpec(f"{path}.synthetic.{key}", "missing; synthetic traffic has arrivals, prompt and output")
    where = f"{path}.synthetic"
    return Synthetic(
        _cv(synthetic["arrivals"], f"{where}.arrivals"),
        _length(synthetic["prompt"], f"{where}.prompt"),
        _length(synthetic["output"], f"{where}.output"),
    )


def parse(raw: Any, tiers: tuple[str, ...] | None = None) -> Workload:
    """From loaded YAML. `tiers`: those of the pool, if known. Raises InvalidSpec with the field's path."""
    top = _mapping(raw, "workload", ("duration", "start", "streams"))
    if "duration" not in top:
        raise InvalidSpec("duration", "missing; write how long to simulate, like 30m")
    duration_s = _seconds(top["duration"], "duration")
    if not 0 < duration_s <= 7 * 86400:
        raise InvalidSpec("duration", f"{top['duration']} must be above 0 and at most 168h")
    streams = top.get("streams")
    if not isinstance(streams, list) or not streams:
        raise InvalidSpec("streams", "must be a list of at least one stream: {tier, trace or synthetic, rate}")
    found = []
    for i, value in enumerate(streams):
        path = f"streams[{i}]"
        stream = _mapping(value, path, ("tier", "trace", "synthetic", "rate", "max_tokens"))
        tier = stream.get("tier")
        if not isinstance(tier, str) or not tier:
            raise InvalidSpec(f"{path}.tier", "must be the name of a tier of the pool")
        if tiers is not None and tier not in tiers:
            raise InvalidSpec(f"{path}.tier", f"the pool has no tier {tier!r}; it has {', '.join(tiers)}")
        source = _source(stream, path)
        rate = None if stream.get("rate") is None else _number(stream["rate"], f"{path}.rate", 0, 1e6)
        if rate is None and isinstance(source, Synthetic):
            raise InvalidSpec(f"{path}.rate", "missing; synthetic traffic has no recorded rate, write requests/s")
        limit = None if stream.get("max_tokens") is None else int(_number(stream["max_tokens"], f"{path}.max_tokens", 1, MAX_TOKENS))
        found.append(StreamSpec(tier, source, rate, limit, path))
    start_s = _seconds(top["start"], "start") if top.get("start") is not None else 0.0
    return Workload(duration_s, start_s, tuple(found))
