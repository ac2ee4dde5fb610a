"""From counts to GPUs, with the least disturbance: widest groups first; what runs stays; else the block whose loss moves least KV."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nitsum.planner.types import NodeView
from nitsum.topology import Gpu


@dataclass(frozen=True)
class Slot:
    """`wanted` groups of one pool at one TP for these tiers, on nodes of one class."""

    pool: str
    tp_size: int
    tiers: tuple[str, ...]
    wanted: int


@dataclass(frozen=True)
class Placed:
    """One group on real GPUs."""

    pool: str
    agent_id: str
    gpus: tuple[Gpu, ...]
    tiers: tuple[str, ...]

    key: tuple[str, str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    """Pool, node, uuids of its GPUs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.pool, self.agent_id, tuple([g.uuid for g in self.gpus])))


Running = Mapping[tuple[str, str, tuple[str, ...]], tuple[str, ...]]
"""Tiers of what runs, by `Placed.key`."""


def place(slots: list[Slot], nodes: list[NodeView], running: Running, barred: frozenset[str] = frozenset()) -> list[Placed] | None:
    """None where the blocks do not suffice (degrees that do not divide each other may not pack). `barred`: GPUs that must stay free."""
    tokens = {u: n.resident_tokens.get(g.group_id, 0) for n in nodes for g in n.layout.groups for u in g.gpu_uuids}
    warm = {(e.model, n.node.agent_id, e.gpu_uuids) for n in nodes for e in n.residency.engines}
    models = {g.pool: g.model for n in nodes for g in n.layout.groups}
    used = set(barred)
    wanted: dict[tuple[str, int], int] = {}
    for s in slots:
        wanted[s.pool, s.tp_size] = wanted.get((s.pool, s.tp_size), 0) + s.wanted
    stays = {u: (pool, len(uuids)) for pool, _, uuids in running for u in uuids}
    placed: list[Placed] = []
    for pool, tp_size in sorted(wanted, key=lambda w: (-w[1], w[0])):
        free = [(n.node.agent_id, b) for n in nodes for b in n.node.blocks(tp_size) if not used & {g.uuid for g in b}]

        def cost(at: tuple[str, tuple[Gpu, ...]], pool: str = pool) -> tuple[object, ...]:
            uuids = tuple(g.uuid for g in at[1])
            same = (pool, at[0], uuids) in running
            pushed = 0 if same else sum(wanted.get(stays[u], 0) > 0 for u in uuids if u in stays)
            foreign = sum(u in stays and stays[u][0] != pool for u in uuids)
            cold = (models.get(pool, ""), at[0], uuids) not in warm
            return not same, foreign, cold, pushed, sum(tokens.get(u, 0) for u in uuids), at[0], at[1]

        free.sort(key=cost)
        n = wanted[pool, tp_size]
        if len(free) < n:
            return None
        mine = free[:n]
        used |= {g.uuid for _, b in mine for g in b}
        placed += labelled(pool, [s for s in slots if (s.pool, s.tp_size) == (pool, tp_size)], mine, running)
    return sorted(placed, key=lambda p: p.key)


def labelled(pool: str, slots: list[Slot], blocks: list[tuple[str, tuple[Gpu, ...]]], running: Running) -> list[Placed]:
    """Which of the blocks serves which tiers: those that served them before go on."""
    left = {s.tiers: s.wanted for s in slots}
    placed, others = [], []
    for agent_id, gpus in sorted(blocks, key=lambda b: (b[0], b[1][0].index)):
        tiers = running.get((pool, agent_id, tuple([g.uuid for g in gpus])), ())
        if left.get(tiers, 0) > 0:
            left[tiers] -= 1
            placed.append(Placed(pool, agent_id, gpus, tiers))
        else:
            others.append((agent_id, gpus))
    names = [tiers for tiers, n in sorted(left.items()) for _ in range(n)]
    assert len(names) >= len(others), f"{pool}: {len(others) - len(names)} groups without tiers"
    return placed + [Placed(pool, *at, tiers) for at, tiers in zip(others, names, strict=False)]
