"""Layouts made by hand: all GPUs of a budget cut into groups of one TP, or partitioned between tiers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nitsum.errors import InvalidSpec
from nitsum.layout import Group, Layout, TierShare
from nitsum.pool import Pool
from nitsum.topology import Gpu, Node


@dataclass(frozen=True)
class Part:
    """`count` groups of `tp_size` for these tiers."""

    tp_size: int
    count: int
    tiers: tuple[str, ...]


def _group(pool: Pool, gpus: tuple[Gpu, ...], tiers: tuple[str, ...]) -> Group:
    mark = f"-{pool.checkpoint}" if pool.checkpoint else ""
    engine_id = f"{pool.name.replace('/', '.')}-tp{len(gpus)}-{gpus[0].index}{mark}"  # as the planner names it, so that it knows it again
    shares = tuple(TierShare(t, 1 / len(tiers)) for t in sorted(tiers))
    return Group(engine_id, engine_id, pool.name, pool.model, len(gpus), tuple(g.uuid for g in gpus), shares=shares)


def partition(pool: Pool, nodes: Iterable[Node], parts: Sequence[Part]) -> Mapping[str, Layout] | None:
    """Widest groups first, on aligned blocks, node by node. None: it does not fit."""
    groups: dict[str, list[Group]] = {n.agent_id: [] for n in nodes}
    used: set[str] = set()
    left = pool.budget_gpus
    for part in sorted(parts, key=lambda p: (-p.tp_size, p.tiers)):
        count = part.count
        for n in sorted(nodes, key=lambda n: n.agent_id):
            for block in n.blocks(part.tp_size):
                if count and left >= part.tp_size and not used & {g.uuid for g in block}:
                    used |= {g.uuid for g in block}
                    groups[n.agent_id].append(_group(pool, block, part.tiers))
                    count, left = count - 1, left - part.tp_size
        if count:
            return None
    return {a: Layout(tuple(gs)) for a, gs in groups.items()}


def uniform(pool: Pool, nodes: Sequence[Node], tp_size: int, path: str) -> Mapping[str, Layout]:
    """As many groups of this TP as the budget allows, every tier on each. Raises InvalidSpec."""
    count = min(pool.budget_gpus // tp_size, sum(len(n.blocks(tp_size)) for n in nodes))
    layout = partition(pool, nodes, (Part(tp_size, count, tuple(t.name for t in pool.tiers)),)) if count else None
    if layout is None:
        raise InvalidSpec(path, f"no group of TP {tp_size} fits the fleet and the budget of {pool.budget_gpus} GPUs")
    return layout
