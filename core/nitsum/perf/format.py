"""Reading a profile: every error names the field and what is legal."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from nitsum.errors import InvalidSpec
from nitsum.perf.flip import FlipRates, KvPath
from nitsum.perf.memory import ENGINE_BYTES, KV_FRACTION, GpuMemory, RankMemory
from nitsum.perf.tables import MixedStep, Profile, TpTable

FORMAT = 2
ORIGINS = ("modelled", "measured")
_FIELDS = ("format", "model", "aliases", "gpu", "origin", "note", "source", "context_length", "mixed", "memory", "flip", "tp")
T = TypeVar("T")


def _number(value: Any, path: str, least: float = 0.0, most: float = math.inf, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidSpec(path, f"must be a number, not {json.dumps(value)}")
    if not least <= value <= most or (above and value == least):
        limits = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        raise InvalidSpec(path, f"must be {limits}, not {value:g}")
    return float(value)


def _row(value: Any, path: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidSpec(path, "must be a list of numbers that are not negative")
    return tuple(_number(x, f"{path}[{i}]") for i, x in enumerate(value))


def _axis(value: Any, path: str) -> tuple[float, ...]:
    row = _row(value, path)
    if any(b <= a for a, b in itertools.pairwise(row)):
        raise InvalidSpec(path, "must grow from each value to the next")
    return row


def _grid(value: Any, path: str, xs: tuple[float, ...], ys: tuple[float, ...], names: str) -> tuple[tuple[float, ...], ...]:
    """Step times: positive, and never falling as there is more work."""
    if not isinstance(value, list) or len(value) != len(xs):
        raise InvalidSpec(path, f"must hold {len(xs)} rows, {names}")
    rows = tuple(_row(r, f"{path}[{i}]") for i, r in enumerate(value))
    for i, row in enumerate(rows):
        if len(row) != len(ys):
            raise InvalidSpec(f"{path}[{i}]", f"must hold {len(ys)} values, {names}; it holds {len(row)}")
        for j, ms in enumerate(row):
            if ms <= 0:
                raise InvalidSpec(f"{path}[{i}][{j}]", "must be above 0: a step takes time")
            if (i and ms < rows[i - 1][j]) or (j and ms < row[j - 1]):
                raise InvalidSpec(f"{path}[{i}][{j}]", f"{ms:g} is below the value before it: a step is never faster with more work")
    return rows


def _object(value: Any, path: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    legal = ", ".join((*required, *(f"{o} (optional)" for o in optional)))
    if not isinstance(value, dict):
        raise InvalidSpec(path, f"must be an object with {legal}")
    if missing := [k for k in required if k not in value]:
        raise InvalidSpec(path, f"lacks {missing[0]!r}; it has {legal}")
    if unknown := sorted(value.keys() - {*required, *optional}):
        raise InvalidSpec(f"{path}.{unknown[0]}", f"unknown field; legal are {legal}")
    return value


def _one_of(value: Any, path: str, kind: Callable[[str], T], legal: tuple[str, ...]) -> T:
    if value not in legal:
        raise InvalidSpec(path, f"must be {' or '.join(f'`{v}`' for v in legal)}")
    return kind(value)


def _table(raw: Any, path: str) -> TpTable:
    t = _object(raw, path, ("decode",), ("prefill", "kv_tokens", "memory", "door_ms"))
    d = _object(t["decode"], f"{path}.decode", ("batch", "context", "ms"))
    batch, context = _axis(d["batch"], f"{path}.decode.batch"), _axis(d["context"], f"{path}.decode.context")
    decode = _grid(d["ms"], f"{path}.decode.ms", batch, context, "a row per batch and a column per context")
    f = _object(t.get("prefill"), f"{path}.prefill", ("tokens", "ms"), ("cached",))
    tokens = _axis(f["tokens"], f"{path}.prefill.tokens")
    cached: tuple[float, ...] = ()
    if "cached" in f:
        cached = _axis(f["cached"], f"{path}.prefill.cached")
        if cached[0]:
            raise InvalidSpec(f"{path}.prefill.cached", "must begin with 0")
        rows = _grid(f["ms"], f"{path}.prefill.ms", tokens, cached, "a row per tokens and a column per cached")
    else:
        flat = [[x] for x in f["ms"]] if isinstance(f["ms"], list) else f["ms"]
        rows = _grid(flat, f"{path}.prefill.ms", tokens, (0.0,), "a value per tokens")
    if "kv_tokens" not in t and "memory" not in t:
        raise InvalidSpec(path, "lacks 'memory' (weight_bytes, kv_bytes_per_token) or 'kv_tokens'")
    memory = None
    if "memory" in t:
        m = _object(t["memory"], f"{path}.memory", ("weight_bytes", "kv_bytes_per_token"), ("activation_bytes",))
        memory = RankMemory(
            int(_number(m["weight_bytes"], f"{path}.memory.weight_bytes")),
            int(_number(m["kv_bytes_per_token"], f"{path}.memory.kv_bytes_per_token", 1)),
            int(_number(m.get("activation_bytes", 0), f"{path}.memory.activation_bytes")),
        )
    kv_tokens = int(_number(t.get("kv_tokens", 0), f"{path}.kv_tokens"))
    door_ms = _number(t.get("door_ms", 0), f"{path}.door_ms")
    first = tuple(r[0] for r in rows)
    return TpTable(batch, context, decode, tokens, first, kv_tokens, cached, rows if cached else (), memory, door_ms)


def _flip(raw: Any, path: str) -> FlipRates:
    names = ("fixed_ms", "pcie_bytes_per_s", "host_bytes_per_s", "nvlink_bytes_per_s")
    f = _object(raw, path, (), (*names, "origin", "path"))
    given = {k: _number(f[k], f"{path}.{k}", above=k != "fixed_ms") for k in names if k in f}
    origin = _one_of(f.get("origin", "modelled"), f"{path}.origin", str, ORIGINS)
    return FlipRates(origin=origin, path=_one_of(f.get("path", "host"), f"{path}.path", KvPath, tuple(KvPath)), **given)


def parse_profile(text: str, name: str) -> Profile:
    """Raises InvalidSpec that names the field."""
    at = f"profile {name}"
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as e:
        raise InvalidSpec(at, f"line {e.lineno}: not JSON: {e.msg}") from e
    if not isinstance(raw, dict):
        raise InvalidSpec(at, "must be a JSON object")
    if unknown := sorted(raw.keys() - {*_FIELDS}):
        raise InvalidSpec(f"{at}: {unknown[0]}", f"unknown field; legal are {', '.join(_FIELDS)}")
    if (version := raw.get("format", 1)) not in (1, FORMAT):
        raise InvalidSpec(f"{at}: format", f"{version!r} is not known here; legal are 1 and {FORMAT}")
    origin = _one_of(raw.get("origin"), f"{at}: origin", str, ORIGINS)
    if not isinstance(tps := raw.get("tp"), dict) or not tps:
        raise InvalidSpec(f"{at}: tp", "must hold a table for at least one TP degree")
    tables = {}
    for tp, t in tps.items():
        if not tp.isdecimal() or not int(tp):
            raise InvalidSpec(f"{at}: tp.{tp}", "a TP degree is a whole number from 1")
        tables[int(tp)] = _table(t, f"{at}: tp.{tp}")
    memory = None
    if "memory" in raw:
        path = f"{at}: memory"
        m = _object(raw["memory"], path, ("gpu_bytes",), ("engine_bytes", "kv_fraction"))
        memory = GpuMemory(
            int(_number(m["gpu_bytes"], f"{path}.gpu_bytes", above=True)),
            int(_number(m.get("engine_bytes", ENGINE_BYTES), f"{path}.engine_bytes")),
            _number(m.get("kv_fraction", KV_FRACTION), f"{path}.kv_fraction", 0, 1, above=True),
        )
        if bare := [tp for tp, t in tables.items() if t.memory is None]:
            raise InvalidSpec(
                f"{at}: tp.{bare[0]}", "lacks 'memory' (weight_bytes, kv_bytes_per_token), which the profile's own `memory` needs"
            )
    elif bare := [tp for tp, t in tables.items() if not t.kv_tokens]:
        raise InvalidSpec(f"{at}: tp.{bare[0]}.kv_tokens", "must be above 0 where the profile has no `memory`")
    flip = raw.get("flip", {})
    old = {"fixed_ms", "kv_copy_tokens_per_s"}
    flat = not isinstance(flip, dict) or flip.keys() <= old
    if flat:
        _object(flip, f"{at}: flip", (), tuple(sorted(old)))
    aliases, source = raw.get("aliases", []), raw.get("source", {})
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise InvalidSpec(f"{at}: aliases", "must be a list of model names")
    if not isinstance(source, dict) or not all(isinstance(v, str) for v in source.values()):
        raise InvalidSpec(f"{at}: source", "must be an object of texts")
    return Profile(
        name,
        str(raw.get("model", "")),
        str(raw.get("gpu", "")),
        origin,
        str(raw.get("note", "")),
        tables,
        _number(flip.get("fixed_ms", 100.0), f"{at}: flip.fixed_ms"),
        _number(flip.get("kv_copy_tokens_per_s", 0.0), f"{at}: flip.kv_copy_tokens_per_s") if flat else 0.0,
        tuple(aliases),
        int(_number(raw.get("context_length", 0), f"{at}: context_length")),
        source,
        _one_of(raw.get("mixed", "overlap"), f"{at}: mixed", MixedStep, tuple(MixedStep)),
        memory,
        None if flat else _flip(flip, f"{at}: flip"),
    )
