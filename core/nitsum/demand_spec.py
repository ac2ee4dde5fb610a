"""d.yaml as typed values: what each tier is expected to ask for. Reading files is the caller's work.

tiers:
  chat: {rate: 20, cv: 1.2, prompt: {mean: 1000, cv: 1}, output: 200}
"""

import math
from collections.abc import Mapping
from typing import Any

from nitsum.demand import TierDemand
from nitsum.errors import InvalidSpec

FIELDS = ("rate", "stddev", "cv", "prompt", "output")


def _number(value: Any, path: str, low: float, high: float) -> float:
    good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not good:
        raise InvalidSpec(path, f"{value!r} must be a number from {low:g} to {high:g}")
    return float(value)


def _length(value: Any, path: str) -> tuple[float, float]:
    """(mean, standard deviation over mean)."""
    if not isinstance(value, Mapping):
        return _number(value, path, 1, 1e6), 0.0
    if extra := [k for k in value if k not in ("mean", "cv")]:
        raise InvalidSpec(f"{path}.{extra[0]}", "unknown field; a length is a number of tokens or {mean, cv}")
    mean = _number(value.get("mean"), f"{path}.mean", 1, 1e6)
    return mean, _number(value.get("cv", 0), f"{path}.cv", 0, 20)


def parse(raw: Any, pool: str, tiers: tuple[str, ...], at: float = 0.0) -> tuple[TierDemand, ...]:
    """Raises InvalidSpec with the field's path. A tier that is not named asks for nothing."""
    if isinstance(raw, Mapping) and (extra := [k for k in raw if k != "tiers"]):
        raise InvalidSpec(str(extra[0]), "unknown field; a demand has tiers alone: {tiers: {NAME: {rate, prompt, output}}}")
    if not isinstance(raw, Mapping) or set(raw) != {"tiers"} or not isinstance(raw["tiers"], Mapping) or not raw["tiers"]:
        raise InvalidSpec("demand", "must be {tiers: {NAME: {rate, prompt, output}}}")
    found = []
    for name, value in raw["tiers"].items():
        path = f"tiers.{name}"
        if name not in tiers:
            raise InvalidSpec(path, f"the pool has no such tier; it has {', '.join(tiers)}")
        if not isinstance(value, Mapping):
            raise InvalidSpec(path, f"must be a mapping with {', '.join(FIELDS)}")
        if extra := [k for k in value if k not in FIELDS]:
            raise InvalidSpec(f"{path}.{extra[0]}", f"unknown field; known are {', '.join(FIELDS)}")
        if missing := [k for k in ("rate", "prompt", "output") if k not in value]:
            raise InvalidSpec(f"{path}.{missing[0]}", "missing; a tier has rate (requests/s), prompt and output (tokens)")
        prompt, prompt_cv = _length(value["prompt"], f"{path}.prompt")
        output, output_cv = _length(value["output"], f"{path}.output")
        rate = _number(value["rate"], f"{path}.rate", 0, 1e6)
        stddev, cv = _number(value.get("stddev", 0), f"{path}.stddev", 0, 1e6), _number(value.get("cv", 1), f"{path}.cv", 0, 20)
        found.append(TierDemand(pool, str(name), rate, stddev, cv, prompt, prompt_cv, output, output_cv, observed_at=at))
    return tuple(sorted(found, key=lambda d: d.tier))
