"""Profiles as JSON, and those in the package (`nitsum/profiles/`). Every profile says its origin, modelled or measured, and how.

    {"format": 2, "model": "org/name", "aliases": [...], "gpu": "h100_sxm", "origin": "modelled", "note": "...", "source": {"tool": ...},
     "context_length": 131072, "mixed": "fused",
     "memory": {"gpu_bytes": ..., "engine_bytes": ..., "kv_fraction": ...},
     "flip": {"fixed_ms": ..., "origin": "modelled", "path": "host",
              "pcie_bytes_per_s": ..., "host_bytes_per_s": ..., "nvlink_bytes_per_s": ...},
     "tp": {"1": {"decode": {"batch": [...], "context": [...], "ms": [[...], ...]},
                  "prefill": {"tokens": [...], "cached": [...], "ms": [[...], ...]},
                  "memory": {"weight_bytes": ..., "kv_bytes_per_token": ..., "activation_bytes": ...},
                  "door_ms": ...}}}

The older form has no `memory`: `kv_tokens` by TP, `prefill.ms` a plain list, `flip` {fixed_ms, kv_copy_tokens_per_s}. Both are read.
"""

import json
from functools import cache
from importlib import resources

from nitsum.errors import InvalidSpec
from nitsum.perf.format import parse_profile
from nitsum.perf.names import gpu_type, model_base, model_key
from nitsum.perf.tables import Profile, TpTable

__all__ = ["Profile", "TpTable", "dump", "find", "load_shipped", "parse", "shipped"]

parse = parse_profile


def _rows(rows: tuple[tuple[float, ...], ...]) -> list[list[float]]:
    return [[float(f"{x:.5g}") for x in r] for r in rows]


def dump(p: Profile) -> str:
    """JSON of the newer form, a row a line. Five digits: finer than any kernel table."""
    raw: dict[str, object] = {"format": 2, "model": p.model, "aliases": list(p.aliases), "gpu": p.gpu, "origin": p.origin, "note": p.note}
    raw |= {"source": p.source, "context_length": p.context_length, "mixed": p.mixed.value}
    if p.memory:
        raw["memory"] = {"gpu_bytes": p.memory.gpu_bytes, "engine_bytes": p.memory.engine_bytes, "kv_fraction": p.memory.kv_fraction}
    if f := p.flip:
        raw["flip"] = {"fixed_ms": f.fixed_ms, "origin": f.origin, "path": f.path.value} | {
            k: getattr(f, k) for k in ("pcie_bytes_per_s", "host_bytes_per_s", "nvlink_bytes_per_s")
        }
    else:
        raw["flip"] = {"fixed_ms": p.flip_fixed_ms, "kv_copy_tokens_per_s": p.kv_copy_tokens_per_s}
    tables: dict[str, object] = {}
    for tp, t in sorted(p.tables.items()):
        prefill: dict[str, object] = {"tokens": t.prefill_tokens, "ms": _rows((t.prefill_ms,))[0]}
        if t.prefill_cached_ms:
            prefill |= {"cached": t.prefill_cached, "ms": _rows(t.prefill_cached_ms)}
        table: dict[str, object] = {"decode": {"batch": t.batch, "context": t.context, "ms": _rows(t.decode_ms)}, "prefill": prefill}
        if t.memory:
            m = t.memory
            table["memory"] = {
                "weight_bytes": m.weight_bytes,
                "kv_bytes_per_token": m.kv_bytes_per_token,
                "activation_bytes": m.activation_bytes,
            }
        if t.kv_tokens:
            table["kv_tokens"] = t.kv_tokens
        if t.door_ms:
            table["door_ms"] = round(t.door_ms, 3)
        tables[str(tp)] = table
    return _lines(raw | {"tp": tables}, 0) + "\n"


def _lines(value: object, depth: int) -> str:
    """Objects and lists of lists break into lines, the rest stays on one."""
    pad = " " * (depth + 1)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict) and value:
        inner = ",\n".join(f"{pad}{json.dumps(k)}: {_lines(v, depth + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + pad[1:] + "}"
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], list | tuple):
            return "[\n" + ",\n".join(pad + _lines(v, depth + 1) for v in value) + "\n" + pad[1:] + "]"
        return "[" + ", ".join(_lines(v, depth) for v in value) + "]"
    return json.dumps(value)


@cache
def shipped() -> tuple[str, ...]:
    """Names of the profiles in the package."""
    return tuple(sorted(f.name.removesuffix(".json") for f in resources.files("nitsum.profiles").iterdir() if f.name.endswith(".json")))


@cache
def _load(name: str) -> Profile:
    return parse((resources.files("nitsum.profiles") / f"{name}.json").read_text(), name)


def load_shipped(name: str) -> Profile:
    """Raises InvalidSpec that lists the names there are."""
    if name not in shipped():
        raise InvalidSpec("spec.profile", f"no profile {name!r}; there are: {', '.join(shipped())}", "UnknownProfile")
    return _load(name)


def find(model: str, gpu: str) -> Profile | None:
    """The shipped profile of this model on this GPU type, by its name, an alias, or the last part of either (a folder of weights)."""
    here = [p for p in map(_load, shipped()) if p.gpu == gpu_type(gpu)]
    for same in (model_key, model_base):
        for p in here:
            if same(model) in (same(name) for name in (p.model, *p.aliases)):
                return p
    return None
