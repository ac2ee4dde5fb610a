"""Split blocks: aligned GPUs of one node, divided between groups that prefill and groups that decode what these hand over.

To the search a block is one group as wide as all of it. On the node it is several, side by side: the wider ones first, of equal width those
that prefill. So each is aligned wherever its block is, and a node's groups tell its blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
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


def widest_of(shape: Shape) -> int:
    """TP of the widest group in it."""
    return shape[0] if len(shape) == 1 else max(shape[2], shape[4])


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
Cell = tuple[Role, int, int]
"""Of a GPU: its group's role and TP, and which of the group's GPUs it is."""


def read(node: Node, groups: Iterable[Group]) -> list[Block]:
    """The split blocks that one pool's groups on a node make up. A group with a role that is in none has lost its partners."""
    cells: dict[str, Cell] = {}
    by_first: dict[str, Group] = {}
    for g in groups:
        if g.role is not Role.MIXED:
            by_first[g.gpu_uuids[0]] = g
            for i, uuid in enumerate(g.gpu_uuids):
                cells[uuid] = g.role, g.tp_size, i
    if not cells:
        return []
    ordered = [g for (g,) in node.blocks(1)]
    found = _read(tuple([cells.get(g.uuid) for g in ordered]), tuple([g.island for g in ordered]))
    return [(split, tuple(by_first[g.uuid] for g in ordered[at : at + split.gpus] if g.uuid in by_first)) for at, split in found]


@lru_cache(maxsize=4096)
def _read(cells: tuple[Cell | None, ...], islands: tuple[int, ...]) -> tuple[tuple[int, Split], ...]:
    """(first GPU, how it divides) of each block. Nodes that look alike are read once."""
    sizes = sorted({size for size in (*SIZES, len(cells)) if 1 < size <= len(cells)}, reverse=True)

    def within(first: int, end: int, sizes: list[int]) -> list[tuple[int, Split]]:
        """Where smaller blocks explain all groups of an aligned one, it is those; else it is one itself if it divides."""
        found: list[tuple[int, Split]] = []
        seen: set[int] = set()
        for i, size in enumerate(sizes):
            for at in range(-(-first // size) * size, end - size + 1, size):
                here = range(at, at + size)
                used = sum(cells[j] is not None for j in here)
                if not used or not seen.isdisjoint(here) or len({islands[j] for j in here}) > 1:
                    continue
                seen.update(here)
                inside = within(at, at + size, sizes[i + 1 :])
                if sum(split.gpus for _, split in inside) != used and (whole := _divided(cells[at : at + size])) is not None:
                    inside = [(at, whole)]
                found += inside
        return found

    return tuple(within(0, len(cells), sizes))


def _divided(cells: tuple[Cell | None, ...]) -> Split | None:
    """How groups side by side divide all of a block; None: they do not."""
    parts: list[tuple[Role, int]] = []
    at = 0
    while at < len(cells):
        if (cell := cells[at]) is None:
            return None
        role, tp_size, _ = cell
        if cells[at : at + tp_size] != tuple((role, tp_size, i) for i in range(tp_size)):
            return None
        parts.append((role, tp_size))
        at += tp_size
    widths = {role: [tp for of, tp in parts if of is role] for role in (Role.PREFILL, Role.DECODE)}
    if not all(widths.values()):
        return None
    split = Split(len(widths[Role.PREFILL]), widths[Role.PREFILL][0], len(widths[Role.DECODE]), widths[Role.DECODE][0])
    return split if list(split.parts()) == parts else None
