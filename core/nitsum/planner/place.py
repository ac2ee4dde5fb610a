"""From counts to GPUs, with the least disturbance: widest groups first; what runs stays, that with the most KV first; else the block whose
loss moves least KV."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nitsum.layout import Role
from nitsum.planner.split import Shape, Split, shape_of
from nitsum.planner.types import NodeView
from nitsum.topology import Gpu


@dataclass(frozen=True)
class Slot:
    """`wanted` groups of one pool at one TP for these tiers, on nodes of one class; or split blocks of so many GPUs."""

    pool: str
    tp_size: int
    tiers: tuple[str, ...]
    wanted: int
    split: Split | None = None

    @property
    def shape(self) -> Shape:
        return shape_of(self.tp_size, self.split)


Key = tuple[str, str, tuple[str, ...], Split | None]
"""Pool, node, uuids of its GPUs; how they divide, if it is a split block."""


@dataclass(frozen=True)
class Placed:
    """One group on real GPUs; with a `split` and no role yet, a split block."""

    pool: str
    agent_id: str
    gpus: tuple[Gpu, ...]
    tiers: tuple[str, ...]
    split: Split | None = None
    role: Role = Role.MIXED

    key: Key = field(init=False, repr=False, compare=False)
    shape: Shape = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        split = self.split if self.role is Role.MIXED else None
        object.__setattr__(self, "key", (self.pool, self.agent_id, tuple([g.uuid for g in self.gpus]), split))
        object.__setattr__(self, "shape", shape_of(len(self.gpus), self.split))

    @property
    def widest(self) -> int:
        return len(self.gpus) if self.split is None else max(self.split.prefill_tp, self.split.decode_tp)

    def groups(self) -> "tuple[Placed, ...]":
        """Itself, or those of its block, each with its role."""
        if self.split is None or self.role is not Role.MIXED:
            return (self,)
        return tuple(Placed(self.pool, self.agent_id, gpus, self.tiers, self.split, role) for role, gpus in self.split.over(self.gpus))


Running = Mapping[Key, tuple[str, ...]]
"""Tiers of what runs, by `Placed.key`."""


def place(slots: list[Slot], nodes: list[NodeView], running: Running, barred: frozenset[str] = frozenset()) -> list[Placed] | None:
    """None where the blocks do not suffice (degrees that do not divide each other may not pack). `barred`: GPUs that must stay free."""
    tokens = {u: n.resident_tokens.get(g.group_id, 0) for n in nodes for g in n.layout.groups for u in g.gpu_uuids}
    warm = {(e.model, n.node.agent_id, e.gpu_uuids) for n in nodes for e in n.residency.engines}
    models = {g.pool: g.model for n in nodes for g in n.layout.groups}
    alive = {(g.pool, n.node.agent_id, g.gpu_uuids) for n in nodes for g in n.layout.groups} if any(s.split for s in slots) else set()
    used = set(barred)
    wanted: dict[tuple[str, Shape], int] = {}
    splits = {s.shape: s.split for s in slots}
    for s in slots:
        wanted[s.pool, s.shape] = wanted.get((s.pool, s.shape), 0) + s.wanted
    stays = {u: (pool, shape_of(len(uuids), split)) for pool, _, uuids, split in running for u in uuids}
    placed: list[Placed] = []
    for pool, shape in sorted(wanted, key=lambda w: (-w[1][0], w[0], w[1])):
        split = splits[shape]
        free = [(n.node.agent_id, b) for n in nodes for b in n.node.blocks(shape[0]) if not used & {g.uuid for g in b}]

        def cost(at: tuple[str, tuple[Gpu, ...]], pool: str = pool, split: Split | None = split) -> tuple[object, ...]:
            uuids = tuple(g.uuid for g in at[1])
            same = (pool, at[0], uuids, split) in running
            pushed = 0 if same else sum(wanted.get(stays[u], 0) > 0 for u in uuids if u in stays)
            foreign = sum(u in stays and stays[u][0] != pool for u in uuids)
            groups = [tuple([g.uuid for g in gpus]) for _, gpus in split.over(at[1])] if split is not None else [uuids]
            strange = sum((pool, at[0], of) not in alive for of in groups) if split is not None else 0  # the others change their role only
            cold = sum((models.get(pool, ""), at[0], of) not in warm for of in groups)
            held = sum(tokens.get(u, 0) for u in uuids)  # of groups as wide that run, not all may be wanted: those with the most stay
            return not same, foreign, strange, cold, pushed, -held if same else held, at[0], at[1]

        free.sort(key=cost)
        n = wanted[pool, shape]
        if len(free) < n:
            return None
        mine = free[:n]
        used |= {g.uuid for _, b in mine for g in b}
        placed += labelled(pool, [s for s in slots if (s.pool, s.shape) == (pool, shape)], mine, running)
    return sorted(placed, key=lambda p: p.key)


def labelled(pool: str, slots: list[Slot], blocks: list[tuple[str, tuple[Gpu, ...]]], running: Running) -> list[Placed]:
    """Which of the blocks serves which tiers: those that served them before go on. `slots`: of one shape."""
    left = {s.tiers: s.wanted for s in slots}
    split = slots[0].split if slots else None
    placed, others = [], []
    for agent_id, gpus in sorted(blocks, key=lambda b: (b[0], b[1][0].index)):
        tiers = running.get((pool, agent_id, tuple([g.uuid for g in gpus]), split), ())
        if left.get(tiers, 0) > 0:
            left[tiers] -= 1
            placed.append(Placed(pool, agent_id, gpus, tiers, split))
        else:
            others.append((agent_id, gpus))
    names = [tiers for tiers, n in sorted(left.items()) for _ in range(n)]
    assert len(names) >= len(others), f"{pool}: {len(others) - len(names)} groups without tiers"
    return placed + [Placed(pool, *at, tiers, split) for at, tiers in zip(others, names, strict=False)]
