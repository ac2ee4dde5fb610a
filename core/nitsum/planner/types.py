"""What the planner is given and what it answers: the port behind which every planner stands."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from nitsum.demand import TierDemand
from nitsum.layout import FlipMode, Layout
from nitsum.perf import FlipCost, StepTimeModel
from nitsum.pool import Pool
from nitsum.residency import Residency
from nitsum.topology import Node


@dataclass(frozen=True)
class NodeView:
    """A node and what runs on it, as its agent last reported.."""

    node: Node
    residency: Residency = Residency()
    """Engines that are warm now."""
    layout: Layout = Layout()
    resident_tokens: dict[str, int] = field(default_factory=dict)
    """By group id: KV tokens of running streams; what a flip of it would move."""
    flipping: bool = False
    schedulable: bool = True
    """False: lost, cordoned or draining. What it has stays as it is, and its GPUs still count against budgets."""
    last_flip_at: float | None = None
    leaving: bool = False
    """To be emptied: what it has goes to other nodes, and nothing comes. A pool that may use no other stays."""


@dataclass(frozen=True)
class PlannerSettings:
    """Times in seconds. `dwell_s`: how long a layout is expected to last, over which a flip must earn back its pause."""

    dwell_s: float = 30.0
    cooldown_s: float = 5.0
    gain_min: float = 0.05
    """Least relative gain in expected goodput that justifies a flip."""
    headroom_quantile: float = 0.9
    """Plan for this quantile of the rate estimate."""
    stale_after_s: float = 30.0
    flips_at_once_max: int = 4


@dataclass(frozen=True)
class Snapshot:
    """All that a decision depends on. Input order must not matter."""

    pools: tuple[Pool, ...]
    nodes: tuple[NodeView, ...]
    demand: tuple[TierDemand, ...]
    step_times: dict[str, StepTimeModel]
    """By pool name."""
    flip_costs: dict[str, FlipCost]
    """By pool name."""
    settings: PlannerSettings = PlannerSettings()
    holds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """GPU uuids by pool that lost nodes may still hold."""


class Verdict(StrEnum):
    """`KEEP`: the wanted layouts are those that run. `CHANGE`: at least one node differs. `BLOCKED`: a safe plan cannot be made now."""

    KEEP = "Keep"
    CHANGE = "Change"
    BLOCKED = "Blocked"


@dataclass(frozen=True)
class NodePlan:
    """The whole wanted residency and layout of one node, all pools together."""

    agent_id: str
    residency: Residency
    layout: Layout
    mode: FlipMode = FlipMode.ABORT
    let_finish_s: float = 0.0
    """Longest time for which LET_FINISH waits for streams that run."""


@dataclass(frozen=True)
class TierOutlook:
    """What the plan expects for a tier. `slack` is SLO-safe capacity over planned rate; `binding` names what limits it."""

    tier: str
    rate: float
    safe_rate: float
    feasible: bool
    binding: str = ""

    @property
    def slack(self) -> float:
        return self.safe_rate / self.rate if self.rate > 0 else float("inf")


@dataclass(frozen=True)
class PoolPlan:
    """Why a pool gets what it gets: goes to its status as text."""

    pool: str
    gpus: int
    expected_goodput: float
    """requests/s that meet all targets of their tier."""
    tiers: tuple[TierOutlook, ...]
    reasons: tuple[str, ...]
    rejected: tuple[str, ...] = ()
    """The next best alternatives, each with why it lost."""
    verdict: Verdict = Verdict.KEEP
    would_change: bool = False
    """A better layout is known, but the pool's mode does not let it."""
    held: str = ""
    """Why the layout may not change now, whatever would be better; empty: it may."""
    remedies: tuple[str, ...] = ()
    """What would make its infeasible tiers feasible."""


@dataclass(frozen=True)
class Plan:
    """Equal inputs give equal plans; `plan_id` is a digest of the wanted state."""

    plan_id: str
    nodes: tuple[NodePlan, ...]
    pools: tuple[PoolPlan, ...]

    def node(self, agent_id: str) -> NodePlan | None:
        return next((n for n in self.nodes if n.agent_id == agent_id), None)

    def pool(self, name: str) -> PoolPlan | None:
        return next((p for p in self.pools if p.pool == name), None)


class Planner(Protocol):
    def __call__(self, snapshot: Snapshot, now: float) -> Plan: ...
