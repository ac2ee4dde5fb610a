"""A profile: step times, KV capacity and flip cost of one model on one GPU type, as a table by TP, in JSON.

Shipped profiles lie in `nitsum/profiles/`; their `origin` says whether they were modelled or measured, `note` how.
"""

import itertools
import json
from bisect import bisect_right
from dataclasses import dataclass
from importlib import resources
from typing import Any

from nitsum.errors import InvalidSpec
from nitsum.layout import FlipMode


def _line(xs: tuple[float, ...], ys: tuple[float, ...], x: float) -> float:
    """Piecewise linear; beyond the last point the last slope goes on, below the first the first value holds."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    i = min(bisect_right(xs, x), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(frozen=True)
class TpTable:
    """Of one TP degree. `decode_ms[i][j]`: one step at batch[i] and context[j]; `prefill_ms[k]`: one step of prefill_tokens[k]."""

    batch: tuple[float, ...]
    context: tuple[float, ...]
    decode_ms: tuple[tuple[float, ...], ...]
    prefill_tokens: tuple[float, ...]
    prefill_ms: tuple[float, ...]
    kv_tokens: int


@dataclass(frozen=True)
class Profile:
    """Implements StepTimeModel and FlipCost by interpolation."""

    name: str
    model: str
    gpu: str
    origin: str
    note: str
    tables: dict[int, TpTable]
    flip_fixed_ms: float
    kv_copy_tokens_per_s: float

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.tables))

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        t = self.tables[tp_size]
        return _line(t.batch, tuple(_line(t.context, row, ctx) for row in t.decode_ms), batch)

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        t = self.tables[tp_size]
        if not ctx:
            return _line(t.prefill_tokens, t.prefill_ms, chunk)
        # Attention over what is cached already: the price of the longer prefill less that of its cached part.
        return max(
            _line(t.prefill_tokens, t.prefill_ms, chunk + ctx) - _line(t.prefill_tokens, t.prefill_ms, ctx),
            _line(t.prefill_tokens, t.prefill_ms, chunk),
        )

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        """A mixed step reads the weights once: the two alone, less the smaller one's fixed part."""
        if not batch or not chunk:
            return self.prefill_ms(tp_size, chunk) if chunk else self.decode_ms(tp_size, batch, ctx)
        prefill, decode = self.prefill_ms(tp_size, chunk), self.decode_ms(tp_size, batch, ctx)
        return prefill + decode - min(self.prefill_ms(tp_size, 1), self.decode_ms(tp_size, 1, ctx))

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        """As calibrated with every TP of the profile resident; v0 does not model other residencies."""
        return self.tables[tp_size].kv_tokens

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        """Fixed part + KV made again: computed at B's prefill rate (ABORT), or copied (MIGRATE_FIRST) where that is faster."""
        computed = self.prefill_ms(to_tp, resident_tokens) if resident_tokens else 0.0
        copied = resident_tokens / self.kv_copy_tokens_per_s * 1e3 if self.kv_copy_tokens_per_s else computed
        return self.flip_fixed_ms + (min(computed, copied) if mode is FlipMode.MIGRATE_FIRST else computed)


def _row(value: Any, path: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(x, int | float) and x >= 0 for x in value):
        raise InvalidSpec(path, "must be a list of numbers that are not negative")
    return tuple(float(x) for x in value)


def _axis(value: Any, path: str) -> tuple[float, ...]:
    row = _row(value, path)
    if any(b <= a for a, b in itertools.pairwise(row)):
        raise InvalidSpec(path, "must grow from each value to the next")
    return row


def parse(text: str, name: str) -> Profile:
    """Raises InvalidSpec that names the field."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as e:
        raise InvalidSpec(f"profile {name}", f"line {e.lineno}: not JSON: {e.msg}") from e
    tables: dict[int, TpTable] = {}
    if raw.get("origin") not in ("modelled", "measured"):
        raise InvalidSpec(f"profile {name}: origin", "must be `modelled` or `measured`")
    for tp, t in raw.get("tp", {}).items():
        path = f"profile {name}: tp.{tp}"
        try:
            batch, context = _axis(t["decode"]["batch"], f"{path}.decode.batch"), _axis(t["decode"]["context"], f"{path}.decode.context")
            rows = tuple(_row(r, f"{path}.decode.ms[{i}]") for i, r in enumerate(t["decode"]["ms"]))
            tokens, ms = _axis(t["prefill"]["tokens"], f"{path}.prefill.tokens"), _row(t["prefill"]["ms"], f"{path}.prefill.ms")
            kv_tokens = int(t["kv_tokens"])
        except (KeyError, TypeError) as e:
            raise InvalidSpec(path, f"lacks {e}; a table has decode {{batch, context, ms}}, prefill {{tokens, ms}}, kv_tokens") from e
        if len(rows) != len(batch) or any(len(r) != len(context) for r in rows) or len(ms) != len(tokens):
            raise InvalidSpec(path, "decode.ms must have a row per batch and a column per context, prefill.ms a value per tokens")
        tables[int(tp)] = TpTable(batch, context, rows, tokens, ms, kv_tokens)
    if not tables:
        raise InvalidSpec(f"profile {name}: tp", "must hold a table for at least one TP degree")
    flip = raw.get("flip", {})
    return Profile(
        name,
        str(raw.get("model", "")),
        str(raw.get("gpu", "")),
        raw["origin"],
        str(raw.get("note", "")),
        tables,
        float(flip.get("fixed_ms", 100.0)),
        float(flip.get("kv_copy_tokens_per_s", 0.0)),
    )


def shipped() -> tuple[str, ...]:
    """Names of the profiles in the package."""
    return tuple(sorted(f.name.removesuffix(".json") for f in resources.files("nitsum.profiles").iterdir() if f.name.endswith(".json")))


def load_shipped(name: str) -> Profile:
    """Raises InvalidSpec that lists the names there are."""
    if name not in shipped():
        raise InvalidSpec("spec.profile", f"no profile {name!r}; there are: {', '.join(shipped())}", "UnknownProfile")
    return parse((resources.files("nitsum.profiles") / f"{name}.json").read_text(), name)


def find(model: str, gpu: str) -> Profile | None:
    """The shipped profile of this model on this GPU type."""
    return next((p for p in map(load_shipped, shipped()) if (p.model, p.gpu) == (model, gpu)), None)
