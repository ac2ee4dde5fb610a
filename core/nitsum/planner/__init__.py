"""Snapshot in, Plan out. Never above a budget, never two groups on a GPU, never a flip that does not pay for its pause."""

from nitsum.planner.types import (
    NodePlan,
    NodeView,
    Plan,
    Planner,
    PlannerSettings,
    PoolPlan,
    Snapshot,
    TierOutlook,
    Verdict,
)

__all__ = [
    "NodePlan",
    "NodeView",
    "Plan",
    "Planner",
    "PlannerSettings",
    "PoolPlan",
    "Snapshot",
    "TierOutlook",
    "Verdict",
]
