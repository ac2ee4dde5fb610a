"""A profile's tables, and the step times, memory and flip cost that follow from them."""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from nitsum.layout import FlipMode
from nitsum.perf.flip import FlipParts, FlipRates, KvFate
from nitsum.perf.grid import Grid
from nitsum.perf.memory import GpuMemory, RankMemory

TYPICAL_STREAM_TOKENS = 2048
"""Length of a stream whose KV is computed again, where the caller does not say how many streams there are."""


class MixedStep(StrEnum):
    """What one step with prefill and decode tokens costs.

    FUSED: prefill of chunk + batch tokens, plus the decodes' attention, which is decode(batch, ctx) - decode(batch, 0): within a few
    percent of aiconfigurator's mixed step (tests/golden/test_profiles.py). OVERLAP: the two alone, less the smaller one's fixed part.
    SEPARATE: two steps, one after the other, as stock SGLang runs them without --enable-mixed-chunk.
    """

    FUSED = "fused"
    OVERLAP = "overlap"
    SEPARATE = "separate"


@dataclass(frozen=True)
class TpTable:
    """Of one TP degree. `decode_ms[i][j]`: one step at batch[i] and context[j].

    `prefill_ms[k]`: one step of prefill_tokens[k] with nothing cached. `prefill_cached_ms[k][j]`, where there is one: of
    prefill_tokens[k] behind prefill_cached[j] cached tokens. `kv_tokens`: as calibrated; 0 where `memory` says it.
    """

    batch: tuple[float, ...]
    context: tuple[float, ...]
    decode_ms: tuple[tuple[float, ...], ...]
    prefill_tokens: tuple[float, ...]
    prefill_ms: tuple[float, ...]
    kv_tokens: int = 0
    prefill_cached: tuple[float, ...] = ()
    prefill_cached_ms: tuple[tuple[float, ...], ...] = ()
    memory: RankMemory | None = None
    door_ms: float = 0.0
    """What a request waits outside the engine's steps, before its first token is with the client: HTTP, tokenizer, the way back. It holds
    nobody else up."""
    decode: Grid = field(init=False, repr=False, compare=False)
    prefill: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cached, rows = self.prefill_cached or (0.0,), self.prefill_cached_ms or tuple((ms,) for ms in self.prefill_ms)
        object.__setattr__(self, "decode", Grid(self.batch, self.context, self.decode_ms))
        object.__setattr__(self, "prefill", Grid(self.prefill_tokens, cached, rows))

    @cached_property
    def pair_ms(self) -> float:
        """Attention of one new token over one older one, from the longest chunk behind the longest cached context; 0 where unknown."""
        if not self.prefill_cached_ms:
            return 0.0
        row, pairs = self.prefill_cached_ms[-1], self.prefill_tokens[-1] * (self.prefill_cached[-1] - self.prefill_cached[0])
        return max(row[-1] - row[0], 0.0) / pairs if pairs else 0.0


@dataclass(frozen=True)
class Profile:
    """Implements StepTimeModel and FlipCost by interpolation (`grid`): beyond the tables the last slope goes on."""

    name: str
    model: str
    gpu: str
    origin: str
    note: str
    tables: dict[int, TpTable]
    flip_fixed_ms: float = 100.0
    kv_copy_tokens_per_s: float = 0.0
    aliases: tuple[str, ...] = ()
    context_length: int = 0
    """Longest sequence that the model takes; 0: unknown."""
    source: dict[str, str] = field(default_factory=dict)
    mixed: MixedStep = MixedStep.OVERLAP
    memory: GpuMemory | None = None
    flip: FlipRates | None = None

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.tables))

    def door_ms(self, tp_size: int) -> float:
        return self.tables[tp_size].door_ms

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return self.tables[tp_size].decode.at(batch, ctx)

    def decode_ms_many(self, tp_size: int, batch: Any, ctx: Any) -> Any:
        """`decode_ms` for numpy arrays."""
        return self.tables[tp_size].decode.many(batch, ctx)

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0, sequences: int = 1) -> float:
        """`sequences` > 1: the chunk holds that many prompts of equal length, each behind `ctx` tokens; they do not see each other."""
        t = self.tables[tp_size]
        if ctx and not t.prefill_cached_ms:
            # Attention over what is cached already: the price of the longer prefill less that of its cached part.
            whole, part, alone = t.prefill.at(chunk + ctx, 0), t.prefill.at(ctx, 0), t.prefill.at(chunk, 0)
            return max(whole - part, alone)
        ms = t.prefill.at(chunk, ctx)
        if sequences > 1:
            ms -= t.pair_ms * chunk * chunk / 2 * (1 - 1 / sequences)
        return ms

    def prefill_ms_many(self, tp_size: int, chunk: Any, ctx: Any = 0) -> Any:
        """`prefill_ms` for numpy arrays, on profiles with a table of cached contexts."""
        t = self.tables[tp_size]
        assert t.prefill_cached_ms, f"{self.name}: no table of cached contexts"
        return t.prefill.many(chunk, ctx)

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int, cached: int = 0) -> float:
        """`ctx`: the decodes' mean context; `cached`: what the chunk has behind it. How: `MixedStep`."""
        if not batch or not chunk:
            return self.prefill_ms(tp_size, chunk, cached) if chunk else self.decode_ms(tp_size, batch, ctx)
        decode = self.decode_ms(tp_size, batch, ctx)
        if self.mixed is MixedStep.FUSED:
            attention = decode - self.decode_ms(tp_size, batch, 0)
            return max(self.prefill_ms(tp_size, chunk + batch, cached) + attention, decode)
        prefill = self.prefill_ms(tp_size, chunk, cached)
        if self.mixed is MixedStep.SEPARATE:
            return prefill + decode
        return prefill + decode - min(self.prefill_ms(tp_size, 1), self.decode_ms(tp_size, 1, ctx))

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        """By the memory model. Without one: as calibrated, whatever else is resident."""
        if self.memory is None:
            return self.tables[tp_size].kv_tokens
        rank = {tp: t.memory for tp, t in self.tables.items() if t.memory is not None}
        return self.memory.kv_tokens(rank, tp_size, resident_tp)

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int, streams: int = 0) -> float:
        return self.flip_parts(resident_tokens, mode, from_tp, to_tp, streams).pause_ms

    def flip_parts(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int, streams: int = 0) -> FlipParts:
        """`resident_tokens` and `streams` of one group of A.

        An engine of B gets the streams of to_tp / from_tp such groups (a part of one where it is below 1). LET_FINISH: they end on A, which
        goes on yielding. ABORT: computed again on B. MIGRATE_FIRST: kept where TP does not change, else copied, or computed where that
        is faster.
        """
        rank = self.tables[to_tp].memory
        if self.flip is None or rank is None:
            return self._flat_parts(resident_tokens, mode, to_tp)
        fixed = self.flip.fixed_ms
        if mode is FlipMode.LET_FINISH or not resident_tokens:
            return FlipParts(fixed, 0.0, KvFate.KEPT)
        tokens = resident_tokens * to_tp / from_tp
        length = resident_tokens / streams if streams else min(TYPICAL_STREAM_TOKENS, resident_tokens)
        computed = self.prefill_ms(to_tp, round(length)) * tokens / length
        if mode is FlipMode.MIGRATE_FIRST:
            if from_tp == to_tp:
                return FlipParts(fixed, 0.0, KvFate.KEPT)
            copied = self.flip.copy_ms(tokens * rank.kv_bytes_per_token, from_tp, to_tp)
            if copied < computed:
                return FlipParts(fixed, copied, KvFate.COPIED)
        return FlipParts(fixed, computed, KvFate.RECOMPUTED)

    def load_ms(self, tokens: int, tp_size: int) -> float | None:
        """KV of one stream from the node's store to a group, beside its steps. None: no rate is known, so KV is computed again."""
        rank = self.tables[tp_size].memory
        if self.flip is not None and rank is not None:
            return self.flip.load_ms(tokens * rank.kv_bytes_per_token, tp_size)
        return tokens / self.kv_copy_tokens_per_s * 1e3 if self.kv_copy_tokens_per_s else None

    def _flat_parts(self, resident_tokens: int, mode: FlipMode, to_tp: int) -> FlipParts:
        """Without rates and memory: one prefill of all tokens at B, or a flat copy rate."""
        if mode is FlipMode.LET_FINISH:
            return FlipParts(self.flip_fixed_ms, 0.0, KvFate.KEPT)
        computed = self.prefill_ms(to_tp, resident_tokens) if resident_tokens else 0.0
        if mode is FlipMode.MIGRATE_FIRST and self.kv_copy_tokens_per_s:
            copied = resident_tokens / self.kv_copy_tokens_per_s * 1e3
            if copied < computed:
                return FlipParts(self.flip_fixed_ms, copied, KvFate.COPIED)
        return FlipParts(self.flip_fixed_ms, computed, KvFate.RECOMPUTED if resident_tokens else KvFate.KEPT)
