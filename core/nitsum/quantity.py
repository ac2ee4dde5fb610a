"""Durations and shares as people write them in a ServingPool: `300ms`, `1.5s`, `99%`."""

import re

from nitsum.errors import InvalidSpec

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|m|h)")
_FACTOR_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4, "h": 3.6e6}
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")


def duration_ms(text: str, path: str) -> float:
    """`300ms` -> 300.0. Raises InvalidSpec naming `path`."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InvalidSpec(path, f"{text!r} is not a duration; write a number and a unit: 20ms, 1.5s, 2m, 1h")
    return float(match[1]) * _FACTOR_MS[match[2]]


def share(text: str, path: str) -> float:
    """`99%` -> 0.99. Raises InvalidSpec naming `path`."""
    match = _SHARE.fullmatch(text)
    if match is None or not 0 < float(match[1]) <= 100:
        raise InvalidSpec(path, f"{text!r} is not a share; write a percentage above 0% and up to 100%, like 99% or 99.5%")
    return float(match[1]) / 100


def format_ms(value_ms: float) -> str:
    """The shortest exact spelling of a duration: 1000.0 -> `1s`, 20.0 -> `20ms`."""
    return f"{value_ms / 1e3:g}s" if value_ms >= 1e3 and value_ms % 100 == 0 else f"{value_ms:g}ms"
