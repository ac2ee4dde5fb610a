"""Where each tensor of a checkpoint lies in the store's file, and which bytes of it each rank of each TP degree uses. Pure.

A rank's parameter is a run of segments of the file. Parameters that one contiguous range holds are views of it (rows, strided columns,
whole); fused ones (`qkv_proj`, `gate_up_proj`) are several segments, stitched by mapping pages next to each other. Where such a seam is not
on a page boundary the engine copies: `Entry.private_bytes` says how much that costs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nitsum.errors import UnsupportedModel
from nitsum.model import ModelFacts

PAGE_BYTES = 4096
VOCAB_PADDING = 64
"""SGLang pads the vocabulary to this; to this times TP where TP does not divide the padded vocabulary."""
TP_MAX = 64
ROPE = "model.layers.0.self_attn.rotary_emb.cos_sin_cache"
"""All layers share one cache in SGLang, so binding the first layer's binds every layer's."""
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
FUSED = (
    ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
)
LAYER_WHOLE = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.o_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
)
LAYER_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: byte offset, shape and bytes per element. Rows past the checkpoint's are zeros (vocabulary padding)."""

    offset: int
    shape: tuple[int, ...]
    item_bytes: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.item_bytes

    @property
    def size(self) -> int:
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Entry:
    """One parameter of one rank. `segments` are (offset, length) in bytes, back to back; the view starts `offset` elements into them."""

    name: str
    segments: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    item_bytes: int
    is_param: bool = True

    @property
    def mapped(self) -> bool:
        """True if whole pages can stand for it; else the engine copies."""
        return all(start % PAGE_BYTES == 0 for start, _ in self.segments) and all(size % PAGE_BYTES == 0 for _, size in self.segments[:-1])

    @property
    def private_bytes(self) -> int:
        return 0 if self.mapped else sum(size for _, size in self.segments)


@dataclass(frozen=True)
class Plan:
    """Of one model and dtype. `stored` in file order; `size` is the file's, in bytes."""

    facts: ModelFacts
    stored: Mapping[str, Stored]
    size: int

    def entries(self, tp_size: int, rank: int) -> list[Entry]:
        """Every parameter and buffer of a rank. Raises UnsupportedModel for a degree that the model does not divide into."""
        if tp_size not in self.facts.legal_tp(TP_MAX):
            legal = ", ".join(str(tp) for tp in self.facts.legal_tp(TP_MAX))
            raise UnsupportedModel(f"{self.facts.name}: tp_size {tp_size} is not one of {legal}")
        assert 0 <= rank < tp_size
        return list(self._entries(tp_size, rank))

    def private_bytes(self, tp_size: int, rank: int) -> int:
        return sum(e.private_bytes for e in self.entries(tp_size, rank))

    def _entries(self, tp: int, rank: int) -> Iterator[Entry]:
        for name in VOCABULARY:
            if name in self.stored:
                rows = padded_vocabulary(self.facts.vocab_size, tp) // tp
                yield self._rows(name, rank * rows, rows)
        yield self._whole("model.norm.weight")
        for layer in range(self.facts.num_layers):
            prefix = f"model.layers.{layer}."
            for name in LAYER_WHOLE:
                if prefix + name in self.stored:
                    yield self._whole(prefix + name)
            for name in LAYER_COLUMNS:
                yield self._columns(prefix + name, tp, rank)
            for fused, parts in FUSED:
                for leaf in ("weight", "bias"):
                    if f"{prefix}{parts[0]}.{leaf}" in self.stored:
                        yield self._fused(f"{prefix}{fused}.{leaf}", [f"{prefix}{p}.{leaf}" for p in parts], tp, rank)
        if ROPE in self.stored:
            yield self._whole(ROPE, is_param=False)

    def _whole(self, name: str, is_param: bool = True) -> Entry:
        s = self.stored[name]
        return Entry(name, ((s.offset, s.size),), s.shape, _strides(s.shape), 0, s.item_bytes, is_param)

    def _rows(self, name: str, first: int, rows: int) -> Entry:
        """One range: it starts at the page that holds its first byte, so it is never copied."""
        s = self.stored[name]
        assert first + rows <= s.shape[0], (name, first, rows, s.shape)
        start = s.offset + first * s.row_bytes
        page = start // PAGE_BYTES * PAGE_BYTES
        shape = (rows, *s.shape[1:])
        segment = (page, start - page + rows * s.row_bytes)
        return Entry(name, (segment,), shape, _strides(shape), (start - page) // s.item_bytes, s.item_bytes)

    def _columns(self, name: str, tp: int, rank: int) -> Entry:
        s = self.stored[name]
        rows, columns = s.shape
        own = columns // tp
        return Entry(name, ((s.offset, s.size),), (rows, own), (columns, 1), rank * own, s.item_bytes)

    def _fused(self, name: str, parts: list[str], tp: int, rank: int) -> Entry:
        segments: list[tuple[int, int]] = []
        rows = 0
        for part in parts:
            s = self.stored[part]
            first, own = self._part(part, s.shape[0], tp, rank)
            start, size = s.offset + first * s.row_bytes, own * s.row_bytes
            if segments and sum(segments[-1]) == start:
                segments[-1] = (segments[-1][0], segments[-1][1] + size)
            else:
                segments.append((start, size))
            rows += own
        s = self.stored[parts[0]]
        shape = (rows, *s.shape[1:])
        return Entry(name, tuple(segments), shape, _strides(shape), 0, s.item_bytes)

    def _part(self, part: str, rows: int, tp: int, rank: int) -> tuple[int, int]:
        """First row and number of rows of a rank; a KV head is replicated where there are more ranks than KV heads."""
        kv_heads = self.facts.num_kv_heads
        if tp > kv_heads and (".k_proj." in part or ".v_proj." in part):
            head = rank // (tp // kv_heads)
            return head * (rows // kv_heads), rows // kv_heads
        return rank * (rows // tp), rows // tp


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding as SGLang pads it."""
    multiple = VOCAB_PADDING
    if _round_up(vocab_size, multiple) % tp_size != 0:
        multiple *= tp_size
    return _round_up(vocab_size, multiple)


def make_plan(facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]], item_bytes: int, rope: tuple[tuple[int, ...], int] | None) -> Plan:
    """`shapes` of the checkpoint's tensors; `rope` is (shape, bytes per element) of the cos/sin cache.

    Raises UnsupportedModel that names a tensor which is missing, of another shape, or of no use to us.
    """
    shapes = {name: shape for name, shape in shapes.items() if not IGNORED.search(name)}
    if facts.tied_embeddings:
        shapes.pop("lm_head.weight", None)
    wanted = _expected(facts)
    for name, shape in wanted.items():
        if name not in shapes:
            raise UnsupportedModel(f"the checkpoint lacks the tensor {name}")
        if shapes[name] != shape:
            raise UnsupportedModel(f"{name} has shape {shapes[name]}; config.json says {shape}")
    optional = {f"model.layers.{i}.{name}" for i in range(facts.num_layers) for name in (*LAYER_WHOLE, *_biases())}
    if unknown := sorted(set(shapes) - set(wanted) - optional):
        raise UnsupportedModel(f"tensors that are not of a known Llama-like layout: {', '.join(unknown[:5])}")
    rows = max(padded_vocabulary(facts.vocab_size, tp) for tp in facts.legal_tp(TP_MAX))
    stored: dict[str, Stored] = {}
    end = 0
    for group in _groups(facts, shapes):
        end = _round_up(end, PAGE_BYTES)
        for name in group:
            shape = (rows, *shapes[name][1:]) if name in VOCABULARY else shapes[name]
            stored[name] = Stored(end, shape, item_bytes)
            end += stored[name].size
    if rope is not None:
        stored[ROPE] = Stored(_round_up(end, PAGE_BYTES), rope[0], rope[1])
        end = stored[ROPE].offset + stored[ROPE].size
    return Plan(facts, stored, _round_up(end, PAGE_BYTES))


def _groups(facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Tensors that lie back to back, in file order: parts of a fused parameter, so that TP 1 takes them as one range."""
    done: set[str] = set()
    for layer in range(facts.num_layers):
        for _, parts in FUSED:
            for leaf in ("weight", "bias"):
                group = [f"model.layers.{layer}.{p}.{leaf}" for p in parts]
                if all(name in shapes for name in group):
                    done.update(group)
                    yield group
    yield from ([name] for name in sorted(set(shapes) - done))


def _expected(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    hidden, mlp = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (facts.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not facts.tied_embeddings:
        expected["lm_head.weight"] = (facts.vocab_size, hidden)
    return expected | {f"model.layers.{i}.{name}": shape for i in range(facts.num_layers) for name, shape in of_layer.items()}


def _biases() -> list[str]:
    return [f"{part}.bias" for part in FUSED[0][1]]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
