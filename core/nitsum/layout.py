"""Layout: which groups are awake on a node. Group: one awake engine with its role and the tiers that it serves."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    MIXED = "Mixed"
    PREFILL = "Prefill"
    DECODE = "Decode"

    def suits(self, started: bool) -> bool:
        """Whether a stream belongs here that has a token already, or that has none yet."""
        return self is Role.MIXED or (self is Role.DECODE) is started


ORDER = (Role.MIXED, Role.PREFILL, Role.DECODE)


def sort_of(tp_size: int, role: Role) -> str:
    """As people say it: `TP2`, `TP1 prefill`."""
    return f"TP{tp_size}" if role is Role.MIXED else f"TP{tp_size} {role.lower()}"


class FlipMode(StrEnum):
    """How a flip treats streams that run on the layout that ends."""

    LET_FINISH = "LetFinish"
    ABORT = "Abort"
    MIGRATE_FIRST = "MigrateFirst"


@dataclass(frozen=True)
class TierShare:
    """`share` of the group's SLO-safe capacity (0 to 1) promised to `tier`; max_running 0: no cap but the group's."""

    tier: str
    share: float
    max_running: int = 0


@dataclass(frozen=True)
class Capacity:
    """What a group can take without breaking its tiers' SLOs. Zero: not limited."""

    max_running: int = 0
    max_kv_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    max_queued: int = 0
    prefill_tokens_per_step: int = 0
    """Beside streams that decode: see `governor`."""


@dataclass(frozen=True)
class Group:
    """`gpu_uuids[i]` is the GPU of rank i. `group_id` is unique on its node and stays the same while the engine and its GPUs do."""

    group_id: str
    engine_id: str
    pool: str
    model: str
    tp_size: int
    gpu_uuids: tuple[str, ...]
    role: Role = Role.MIXED
    shares: tuple[TierShare, ...] = ()
    capacity: Capacity = Capacity()

    def __post_init__(self) -> None:
        assert len(self.gpu_uuids) == self.tp_size, f"{self.group_id}: TP {self.tp_size} on {len(self.gpu_uuids)} GPUs"


@dataclass(frozen=True)
class Layout:
    """The awake groups of one node. At most one group per GPU, always."""

    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        used = [u for g in self.groups for u in g.gpu_uuids]
        assert len(set(used)) == len(used), f"two groups on one GPU: {self.groups}"
        assert len({g.group_id for g in self.groups}) == len(self.groups), "group ids repeat"

    @property
    def gpu_uuids(self) -> frozenset[str]:
        return frozenset(u for g in self.groups for u in g.gpu_uuids)

    def hands_over(self, group: Group) -> tuple[Group, ...]:
        """Where streams of a prefill group go after their first token: decode groups of its pool; none: they stay."""
        if group.role is not Role.PREFILL:
            return ()
        return tuple(g for g in self.groups if g.pool == group.pool and g.role is Role.DECODE)

    def group(self, group_id: str) -> Group | None:
        return next((g for g in self.groups if g.group_id == group_id), None)

    def successors(self, ended: Group) -> tuple[Group, ...]:
        """Groups of this layout that serve the ended group's pool, those on its own GPUs first."""
        same = [g for g in self.groups if g.pool == ended.pool]
        return tuple(sorted(same, key=lambda g: (not set(g.gpu_uuids) & set(ended.gpu_uuids), g.group_id)))
