"""How many GPUs a demand needs, and how that changes with each target: the slow plane asked again and again, on empty nodes of one shape.

Needed: the least budget with which the plan says that every tier holds its targets. Found by doubling and halving, as more GPUs make no
plan worse (tests/property/test_scaling.py); a budget that ends inside a node counts as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from nitsum.demand import TierDemand
from nitsum.layout import Role
from nitsum.perf import FlipCost, StepTimeModel
from nitsum.planner.types import NodeView, Planner, PlannerSettings, PoolPlan, Snapshot
from nitsum.pool import Pool
from nitsum.topology import Gpu, Node

GPUS_MAX = 1 << 16
FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Of a target, in the curve."""
TARGETS = ("ttft_ms", "tpot_ms")


@dataclass(frozen=True)
class Question:
    """What does not change between sizes: `gpus` of one `gpu_type` in each node; step times that hold for them."""

    pool: Pool
    demand: tuple[TierDemand, ...]
    times: StepTimeModel
    flip_cost: FlipCost
    gpus: int
    gpu_type: str
    settings: PlannerSettings = PlannerSettings()


@dataclass(frozen=True)
class Need:
    """`gpus` None: no number up to GPUS_MAX. `plan`: at that number; else at the largest that was tried."""

    gpus: int | None
    plan: PoolPlan
    groups: tuple[tuple[Role, int], ...]
    """Role and TP of each group in it."""

    @property
    def infeasible(self) -> tuple[str, ...]:
        return tuple(t.tier for t in self.plan.tiers if not t.feasible)


@dataclass(frozen=True)
class CurvePoint:
    """GPUs needed where one target of one tier is `factor` times as long, all else equal; None: no TP holds it."""

    tier: str
    target: str
    factor: float
    target_ms: float
    gpus: int | None


def _planned(q: Question, budget: int, planner: Planner) -> Need:
    count = -(-budget // q.gpus)
    nodes = tuple(
        NodeView(
            Node(
                f"node-{i:05}",
                tuple(Gpu(j, f"node-{i:05}-{j}", q.gpu_type) for j in range(q.gpus)),
                q.pool.node_selector,
                legal_tp={q.pool.model: q.times.tp_sizes},
            ),
        )
        for i in range(count)
    )
    pool = replace(q.pool, budget_gpus=budget)
    plan = planner(Snapshot((pool,), nodes, q.demand, {pool.name: q.times}, {pool.name: q.flip_cost}, q.settings), 0.0)
    (found,) = plan.pools
    holds = bool(found.tiers) and all(t.feasible for t in found.tiers)
    return Need(budget if holds else None, found, tuple(sorted((g.role, g.tp_size) for n in plan.nodes for g in n.layout.groups)))


def _hopeless(need: Need) -> bool:
    """A tier that no TP holds is not helped by more GPUs."""
    return any(not t.feasible and t.binding.endswith("at every TP") for t in need.plan.tiers)


def needed(q: Question, planner: Planner, start: int = 0) -> Need:
    """`start`: a number to begin at, which is quicker where it is near."""
    high = max(start, min(q.times.tp_sizes))
    found = _planned(q, high, planner)
    low = 0
    while found.gpus is None:
        if high >= GPUS_MAX or (_hopeless(found) and high >= q.gpus):
            return found
        low, high = high, high * 2
        found = _planned(q, high, planner)
    while high - low > 1:
        middle = (low + high) // 2
        tried = _planned(q, middle, planner)
        if tried.gpus is None:
            low = middle
        else:
            high, found = middle, tried
    return found


@dataclass(frozen=True)
class Sizing:
    base: Need
    curve: tuple[CurvePoint, ...]
    """Tiers and targets in the pool's order, factors ascending."""


def size(q: Question, planner: Planner, said: Callable[[str], None] = lambda _: None) -> Sizing:
    """Need as asked, and with each target loosened and tightened by FACTORS.

    A plan that holds tighter targets holds looser ones: where the planner, which seeks goodput and ends within a gap, found fewer GPUs for
    tighter ones, that is the answer for the looser ones too.
    """
    base = needed(q, planner)
    needs: dict[tuple[str, str, float], tuple[float, Need]] = {}
    for i, tier in enumerate(q.pool.tiers):
        for target in TARGETS:
            value: float | None = getattr(tier, target)
            for factor in FACTORS if value is not None else ():
                assert value is not None
                said(f"{tier.name}: {target} x {factor:g}")
                moved = replace(tier, **{target: value * factor})  # type: ignore[arg-type]
                tiers = (*q.pool.tiers[:i], moved, *q.pool.tiers[i + 1 :])
                need = base if factor == 1 else needed(replace(q, pool=replace(q.pool, tiers=tiers)), planner, base.gpus or 0)
                needs[tier.name, target, factor] = value * factor, need
    base = min((base, *(need for (_, _, factor), (_, need) in needs.items() if factor < 1)), key=lambda n: n.gpus or GPUS_MAX + 1)
    found: list[CurvePoint] = []
    for (name, target, factor), (ms, need) in needs.items():
        known = [need.gpus, *(p.gpus for p in found if (p.tier, p.target) == (name, target)), *([base.gpus] if factor >= 1 else [])]
        found.append(CurvePoint(name, target, factor, ms, min((g for g in known if g is not None), default=None)))
    return Sizing(base, tuple(found))
