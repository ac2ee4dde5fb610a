"""Split blocks: aligned GPUs of one node, divided between groups that prefill and groups that decode what these hand over.

To the search a block is one group as wide as all of it. On the node it is several, side by side: the wider ones first, of equal width those
that prefill. So each is aligned wherever its block is, and a node's groups tell its blocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from nitsum.layout import Group, Role
from nitsum.topology import Gpu, Node

SIZES = (2, 4, 8)
"""GPUs of a block."""


class Split(NamedTuple):
    """`prefill` groups of TP `prefill_tp`, `decode` groups of TP `decode_tp`."""

    prefill: int
    prefill_tp: int
    decode: int
    decode_tp: int

    @property
    def gpus(self) -> int:
        return self.prefill * self.prefill_tp + self.decode * self.decode_tp

    def parts(self) -> tuple[tuple[Role, int], ...]:
        """Role and TP of each group, in the order of its GPUs."""
        prefill, decode = [(Role.PREFILL, self.prefill_tp)] * self.prefill, [(Role.DECODE, self.decode_tp)] * self.decode
        return tuple(prefill + decode if self.prefill_tp >= self.decode_tp else decode + prefill)

    def over(self, gpus: Sequence[Gpu]) -> Iterator[tuple[Role, tuple[Gpu, ...]]]:
        at = 0
        for role, tp_size in self.parts():
            yield role, tuple(gpus[at : at + tp_size])
            at += tp_size

    def __str__(self) -> str:
        return f"{self.prefill}xTP{self.prefill_tp} prefill + {self.decode}xTP{self.decode_tp} decode"


Shape = tuple[int, ...]
"""What tells sorts of groups apart, besides tiers: the TP; of a split block its GPUs and how they divide."""


def shape_of(gpus: int, split: Split | None) -> Shape:
    return (gpus,) if split is None else (gpus, *split)


@lru_cache(maxsize=64)
def divisions(size: int, tps: tuple[int, ...]) -> tuple[Split, ...]:
    """All ways to divide a block of `size` GPUs between groups of these TPs."""
    return tuple(
        Split(prefill, p, (size - prefill * p) // d, d)
        for p in tps
        for d in tps
        if size % max(p, d) == 0 and max(p, d) % min(p, d) == 0
        for prefill in range(1, (size - d) // p + 1)
        if (size - prefill * p) % d == 0
    )


Block = tuple[Split, tuple[Group, ...]]


def read(node: Node, groups: Iterable[Group]) -> list[Block]:
    """The split blocks that one pool's groups on a node make up. A group with a role that is in none has lost its partners."""
    by_gpu = {u: g for g in groups if g.role is not Role.MIXED for u in g.gpu_uuids}
    if not by_gpu:
        return []
    sizes = sorted({size for size in (*SIZES, len(node.gpus)) if 1 < size <= len(node.gpus)}, reverse=True)
    return _read(node, frozenset(g.uuid for g in node.gpus), sizes, by_gpu)


def _read(node: Node, within: frozenset[str], sizes: Sequence[int], by_gpu: Mapping[str, Group]) -> list[Block]:
    """Of the aligned blocks in `within`: where smaller ones explain all groups of a block, it is those; else it is one if it divides."""
    found: list[Block] = []
    seen: set[str] = set()
    for i, size in enumerate(sizes):
        for block in node.blocks(size):
            uuids = [g.uuid for g in block]
            if not within.issuperset(uuids) or not seen.isdisjoint(uuids):
                continue
            seen.update(uuids)
            if mine := {g.group_id: g for u in uuids if (g := by_gpu.get(u)) is not None}:
                inside = _read(node, frozenset(uuids), sizes[i + 1 :], by_gpu)
                explained = {g.group_id for _, groups in inside for g in groups}
                whole = _divided(uuids, tuple(mine.values())) if explained != mine.keys() else None
                found += [whole] if whole is not None else inside
    return found


def _divided(uuids: list[str], groups: tuple[Group, ...]) -> Block | None:
    """All of a block as these groups divide it; None: they do not."""
    widths = {role: {g.tp_size for g in groups if g.role is role} for role in (Role.PREFILL, Role.DECODE)}
    if any(len(of) != 1 for of in widths.values()) or sum(g.tp_size for g in groups) != len(uuids):
        return None
    (prefill_tp,), (decode_tp,) = widths[Role.PREFILL], widths[Role.DECODE]
    prefill = sum(g.role is Role.PREFILL for g in groups)
    split = Split(prefill, prefill_tp, len(groups) - prefill, decode_tp)
    at, ordered = 0, []
    for role, tp_size in split.parts():
        here = next((g for g in groups if g.role is role and list(g.gpu_uuids) == uuids[at : at + tp_size]), None)
        if here is None:
            return None
        ordered.append(here)
        at += tp_size
    return split, tuple(ordered)
