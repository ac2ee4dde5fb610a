"""What decides about a fleet. A policy is a planner and what it is told: all but `plain` use the production router and ledger."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nitsum.layout import Group, Layout
from nitsum.perf import FlipCost, KvLoad
from nitsum.planner import Planner, PlannerSettings
from nitsum.pool import Pool
from nitsum.sim.engine import EngineLimits


def stock(group: Group) -> EngineLimits:
    """SGLang's own settings."""
    return EngineLimits()


def governed(group: Group) -> EngineLimits:
    """With the prefill budget that the plan gives to the engine's governor."""
    return EngineLimits(mixed_tokens=group.capacity.prefill_tokens_per_step or None)


@dataclass(frozen=True)
class Policy:
    """`pool` may be narrowed (TP, mode). `first`: layouts by agent id that run from the start; without: the planner's first plan."""

    name: str
    pool: Pool
    flip_cost: FlipCost
    resident_tp: tuple[int, ...]
    """What shares a GPU's memory."""
    planner: Callable[[], Planner] | None = None
    """Made anew for each run, for planners remember. None: `plain`: round robin, no admission, the first layout for ever."""
    first: Mapping[str, Layout] | None = None
    settings: PlannerSettings = field(default_factory=PlannerSettings)
    interval_s: float = 1.0
    foresight_s: float = 0.0
    """Above 0: demand is not estimated but read from the traffic that comes in so many seconds."""
    limits: Callable[[Group], EngineLimits] = stock
    """How a group's engine sizes its batches, asked again at each new capacity."""
    kv_load: KvLoad | None = None
    """What a hand-over from a prefill group costs; None: the prompt is prefilled again."""
    note: str = ""
