"""The conditions of a pool, from what the planner wants and what agents report. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nitsum.planner.types import PoolPlan, Verdict
from nitsum.pool import AdaptationMode
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import PoolCondition, Reason
from nitsum_api.resources import Condition
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Judgement
from nitsum_operator.observe import Agent
from nitsum_operator.routes import may_serve

MOVING = (types_pb2.GROUP_STATE_CLOSING, types_pb2.GROUP_STATE_OPENING)
Row = tuple[str, str, str]
"""Status, reason, message."""


def condition(
    kind: str, status: str, reason: str, message: str, old: Mapping[str, Mapping[str, Any]], now: str, generation: int
) -> Condition:
    before = old.get(kind)
    since = before["lastTransitionTime"] if before is not None and before.get("status") == status else now
    return Condition.model_validate(
        {
            "type": str(kind),
            "status": status,
            "reason": str(reason),
            "message": message[:32000],
            "lastTransitionTime": since,
            "observedGeneration": generation,
        }
    )


@dataclass(frozen=True)
class Standing:
    """How one pool stands. `agents`: those it may use; `groups`: its groups on agents that report; `wanted` and `runs` name places."""

    judged: Judgement
    plan: PoolPlan | None
    agents: tuple[Agent, ...]
    strangers: tuple[tuple[str, str], ...]
    groups: tuple[agent_pb2.GroupReport, ...]
    wanted: frozenset[Any]
    runs: frozenset[Any]
    rejections: Mapping[str, str]
    held: int = 0
    gateways: tuple[tuple[str, str], ...] = ()

    @property
    def lost(self) -> tuple[Agent, ...]:
        return tuple(a for a in self.agents if not a.connected)

    @property
    def opened(self) -> int:
        return sum(g.state == types_pb2.GROUP_STATE_OPEN for g in self.groups)

    def rows(self) -> dict[PoolCondition, Row]:
        return {
            PoolCondition.ACCEPTED: (self.judged.status, self.judged.reason, self.judged.message),
            PoolCondition.READY: self._ready(),
            PoolCondition.DEGRADED: self._degraded(),
            PoolCondition.AGENTS_CONNECTED: self._connected(),
            PoolCondition.FEASIBLE: self._feasible(),
            PoolCondition.PROGRESSING: self._progressing(),
        }

    @property
    def _flips(self) -> bool:
        return any(a.report.flip.outcome == agent_pb2.FlipReport.OUTCOME_RUNNING for a in self.agents if a.connected)

    def _ready(self) -> Row:
        if self.judged.accepted is None:
            return "False", Reason.NOT_ACCEPTED, "No spec was accepted yet; see Accepted."
        if self.opened:
            return "True", Reason.SERVING, f"{self.opened} of {len(self.groups)} groups serve."
        if self._flips and any(g.state in MOVING for g in self.groups):
            return "True", Reason.SERVING, "A flip is running; requests wait for the new layout."
        if not self.agents:
            return "False", Reason.NO_AGENTS, "No node with an agent matches spec.budget.nodeSelector."
        name = self.judged.accepted.pool.name
        away = [a for a in self.lost if may_serve(a) and any(r.group.pool.name == name for r in a.report.groups)]
        if away and not self.groups:
            return "Unknown", away[0].trouble, f"{away[0].agent_id}: {away[0].problem}; whether its engine host serves on is not seen here."
        if any(g.state == types_pb2.GROUP_STATE_FAILED for g in self.groups):
            return "False", Reason.ENGINES_FAILED, next((a.report.problem for a in self.agents if a.report.problem), "Engines failed.")
        if self.plan is None:
            return "False", Reason.AWAITING_PLAN, "The first plan is being made."
        if self.plan.verdict is Verdict.BLOCKED:
            return "False", Reason.NOT_ENOUGH_GPUS, "; ".join(self.plan.reasons)
        return "False", Reason.AWAITING_ENGINES, "Engines are being started, warmed up and timed."

    def _degraded(self) -> Row:
        for a in self.agents:
            if not a.connected:
                return "True", a.trouble, f"{a.agent_id}: {a.problem or 'no report'}; its GPUs count as used."
            if a.report.draining:
                return "True", Reason.DRAINING, f"{a.agent_id} is draining."
            if a.leaving and any(r in self.groups for r in a.report.groups):
                return "True", Reason.DRAINING, f"{a.agent_id}: its Node is tainted nitsum.io/drain; what it runs goes elsewhere."
            if self.rejections.get(a.agent_id):
                return "True", Reason.DIRECTIVE_REJECTED, f"{a.agent_id}: {self.rejections[a.agent_id]}"
            if not a.report.host_connected:
                return "True", Reason.HOST_UNAVAILABLE, f"{a.agent_id}: {a.report.problem or 'its engine host does not answer'}"
            if a.report.problem:
                return "True", Reason.ENGINES_FAILED, f"{a.agent_id}: {a.report.problem}"
            if a.report.flip.outcome == agent_pb2.FlipReport.OUTCOME_REVERTED:
                return "True", Reason.FLIP_REVERTED, f"{a.agent_id}: {a.report.flip.message or 'the new layout did not wake'}"
        if self.gateways:
            return ("True", *self.gateways[0])
        if self.plan is not None and self.judged.accepted is not None and self.plan.verdict is not Verdict.BLOCKED:
            found, budget = self.plan.gpus + self.held, self.judged.accepted.pool.budget_gpus
            if found < budget:
                text = f"{found} of the {budget} GPUs of spec.budget are there for it"
                return "True", Reason.NOT_ENOUGH_GPUS, f"{text}; add nodes, widen nodeSelector, or lower spec.budget.gpus."
        return "False", Reason.HEALTHY, "Nothing known to be wrong."

    def _connected(self) -> Row:
        if self.lost:
            return "False", self.lost[0].trouble, f"{self.lost[0].agent_id}: {self.lost[0].problem or 'no report'}"
        if self.strangers:
            return ("False", *self.strangers[0])
        if not self.agents:
            return "False", Reason.NO_AGENTS, "No node with an agent matches spec.budget.nodeSelector."
        return "True", Reason.ALL_CONNECTED, "Reports arrive."

    def _feasible(self) -> Row:
        outlook = self.plan.tiers if self.plan is not None else ()
        if not outlook:
            return "Unknown", Reason.NO_PLAN_YET, "Nothing has been planned yet."
        if (tight := next((t for t in outlook if not t.feasible), None)) is not None:
            ways = "; ".join(self.plan.remedies if self.plan is not None else ())[:800]
            text = ways or f"{tight.tier}: {tight.binding}; raise spec.budget.gpus or loosen its targets"
            return "False", Reason.SLO_INFEASIBLE, f"{text}."
        return "True", Reason.WITHIN_BUDGET, "Every tier is expected to reach its target."

    @property
    def _mode(self) -> AdaptationMode | None:
        return self.judged.accepted.pool.mode if self.judged.accepted is not None else None

    def _progressing(self) -> Row:
        if self._flips:
            return "True", Reason.FLIPPING, "A flip between warm engines is running."
        if any(a.in_progress for a in self.agents if a.connected) or (self.wanted and self.wanted != self.runs):
            return "True", Reason.CHANGING_RESIDENCY, "Engines are being started or stopped."
        if self.judged.accepted is None:
            return "False", Reason.NOT_ACCEPTED, "No spec is in force, so there is nothing to change; see Accepted."
        if self.plan is None:
            return "False", Reason.NO_PLAN_YET, "Nothing has been planned yet."
        if self.plan.verdict is Verdict.BLOCKED:
            return "False", Reason.PLAN_BLOCKED, "; ".join(self.plan.reasons)
        if self.plan.would_change and self._mode is AdaptationMode.ADVISORY:
            return "False", Reason.ADVISORY, self.plan.reasons[-1]
        return "False", Reason.PLANNED, "What runs is what the plan wants."
