"""What people see of a pool: conditions, counts, the plan and why. Pure; written once per cycle, and only when it changed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from nitsum.layout import Layout
from nitsum.planner.types import Plan, Snapshot, Verdict
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import PoolCondition, Reason, summary_reason
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.resources import AgentCounts, Condition, FlipStatus, GpuCounts, GroupCounts, PlanStatus, PoolStatus, TierStatus
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Judgement
from nitsum_operator.observe import Agent

OPEN = types_pb2.GROUP_STATE_OPEN
OUTCOMES: dict[int, Any] = {1: "Running", 2: "Done", 3: "Reverted", 4: "Failed"}


def describe(tps: Iterable[int]) -> str:
    """E.g. `2xTP1 1xTP2`."""
    return " ".join(f"{n}xTP{tp}" for tp, n in sorted(Counter(tps).items()))


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


def tier_figures(
    name: str, gateways: Iterable[gateway_pb2.DemandReport], tiers: Iterable[str], plan: Mapping[str, Any]
) -> list[TierStatus]:
    """Sums over gateways' newest windows."""
    reports = list(gateways)
    result = []
    for tier in tiers:
        rows = [(r, t) for r in reports for t in r.tiers if t.pool.name == name and t.tier == tier and r.window_s > 0]
        finished = sum(t.finished for _, t in rows)
        good = sum(t.met_all for _, t in rows)
        outlook = plan.get(tier)
        result.append(
            TierStatus.model_validate(
                {
                    "name": tier,
                    "rate": f"{sum(t.arrivals / r.window_s for r, t in rows):.1f}/s",
                    "attainment": f"{good / finished:.1%}" if finished else None,
                    "goodput": f"{sum(t.met_all / r.window_s for r, t in rows):.1f}/s",
                    "feasible": outlook.feasible if outlook else None,
                    "binding": (outlook.binding[:128] if not outlook.feasible else "") if outlook else None,
                }
            )
        )
    return result


def _ready(judged: Judgement, ready: int, mine: list[Any], agents: list[Agent], plan: Plan | None, name: str) -> tuple[str, str, str]:
    if judged.accepted is None:
        return "False", Reason.NOT_ACCEPTED, "The spec was never accepted; see Accepted."
    if ready:
        return "True", Reason.SERVING, f"{ready} of {len(mine)} groups serve."
    if not agents:
        return "False", Reason.NO_AGENTS, "No node with an agent matches spec.budget.nodeSelector."
    if any(r.state == types_pb2.GROUP_STATE_FAILED for r in mine):
        return "False", Reason.ENGINES_FAILED, next((a.report.problem for a in agents if a.report.problem), "Engines failed.")
    pool_plan = plan.pool(name) if plan else None
    if pool_plan is not None and pool_plan.verdict is Verdict.BLOCKED:
        return "False", Reason.NOT_ENOUGH_GPUS, "; ".join(pool_plan.reasons)
    if plan is None:
        return "False", Reason.AWAITING_PLAN, "The first plan is being made."
    return "False", Reason.AWAITING_ENGINES, "Engines are being started, warmed up and timed."


def _degraded(agents: list[Agent], rejections: Mapping[str, str]) -> tuple[str, str, str]:
    for a in agents:
        if not a.connected:
            return "True", Reason.AGENT_LOST, f"{a.agent_id}: {a.problem or 'no report'}; its GPUs count as used."
        if a.report.draining:
            return "True", Reason.DRAINING, f"{a.agent_id} is draining."
        if rejections.get(a.agent_id):
            return "True", Reason.DIRECTIVE_REJECTED, f"{a.agent_id}: {rejections[a.agent_id]}"
        if a.report.problem:
            return "True", Reason.ENGINES_FAILED, f"{a.agent_id}: {a.report.problem}"
    return "False", Reason.HEALTHY, "Nothing known to be wrong."


def pool_status(
    obj: Mapping[str, Any],
    judged: Judgement,
    taken: Snapshot | None,
    plan: Plan | None,
    agents: Mapping[str, Agent],
    gateways: Iterable[gateway_pb2.DemandReport],
    rejections: Mapping[str, str],
    flips: Mapping[str, list[FlipStatus]],
    term: int,
    now: str,
) -> PoolStatus:
    """`rejections`: by agent, of the last directive. `now`: RFC 3339."""
    meta, before = obj["metadata"], obj.get("status") or {}
    name, generation = f"{meta['namespace']}/{meta['name']}", meta.get("generation", 0)
    old = {c["type"]: c for c in before.get("conditions") or []}
    a = judged.accepted
    selector = set(a.pool.node_selector) if a else set()
    mine_agents = [x for x in agents.values() if selector <= set(x.labels.items())]
    mine = [r for x in mine_agents if x.connected for r in x.report.groups if r.group.pool.name == name]
    opened = [r for r in mine if r.state == OPEN]
    wanted = [g for n in (plan.nodes if plan else ()) for g in n.layout.groups if g.pool == name]
    pool_plan = plan.pool(name) if plan else None
    outlook = {t.tier: t for t in pool_plan.tiers} if pool_plan else {}
    running = any(x.in_progress for x in mine_agents)
    flipping = any(x.report.flip.outcome == agent_pb2.FlipReport.OUTCOME_RUNNING for x in mine_agents)
    same = {(g.engine_id, g.gpu_uuids) for g in wanted} == {(r.group.engine_id, tuple(r.group.gpu_uuids)) for r in opened}
    tight = next((t for t in outlook.values() if not t.feasible), None)
    lost = [x for x in mine_agents if not x.connected]

    if flipping:
        progress = ("True", Reason.FLIPPING, "A flip between warm engines is running.")
    elif running or (wanted and not same):
        progress = ("True", Reason.CHANGING_RESIDENCY, "Engines are being started or stopped.")
    elif pool_plan is not None and pool_plan.verdict is Verdict.BLOCKED:
        progress = ("False", Reason.PLAN_BLOCKED, "; ".join(pool_plan.reasons))
    else:
        progress = ("False", Reason.PLANNED, "What runs is what the plan wants.")
    if not outlook:
        feasible = ("Unknown", Reason.NO_PLAN_YET, "Nothing has been planned yet.")
    elif tight:
        feasible = ("False", Reason.SLO_INFEASIBLE, f"{tight.tier}: {tight.binding}; raise spec.budget.gpus or loosen its targets.")
    else:
        feasible = ("True", Reason.WITHIN_BUDGET, "Every tier is expected to reach its target.")
    if not mine_agents:
        connected = ("False", Reason.NO_AGENTS, "No node with an agent matches spec.budget.nodeSelector.")
    elif lost:
        connected = ("False", Reason.AGENT_LOST, f"{lost[0].agent_id}: {lost[0].problem or 'no report'}")
    else:
        connected = ("True", Reason.ALL_CONNECTED, "Reports arrive.")
    rows = {
        PoolCondition.ACCEPTED: (judged.status, judged.reason, judged.message),
        PoolCondition.READY: _ready(judged, len(opened), mine, mine_agents, plan, name),
        PoolCondition.DEGRADED: _degraded(mine_agents, rejections),
        PoolCondition.AGENTS_CONNECTED: connected,
        PoolCondition.FEASIBLE: feasible,
        PoolCondition.PROGRESSING: progress,
    }
    conditions = [condition(k, *row, old, now, generation) for k, row in rows.items()]
    tiers = tier_figures(name, gateways, [t.name for t in a.pool.tiers] if a else [], outlook)
    held = sum(len(set(u)) for p, u in (taken.holds if taken else {}).items() if p == name)
    used = sum(r.group.tp_size for r in mine)
    budget = a.pool.budget_gpus if a else obj["spec"]["budget"]["gpus"]
    reports = [(r.window_s, t) for r in gateways for t in r.tiers if t.pool.name == name and r.window_s > 0]
    finished, good = sum(t.finished for _, t in reports), sum(t.met_all for _, t in reports)
    last = flips.get(name, [])
    return PoolStatus(
        observed_generation=generation,
        term=term,
        reason=summary_reason(conditions),
        layout=describe(r.group.tp_size for r in opened),
        attainment=f"{good / finished:.1%}" if finished else before.get("attainment"),
        goodput=f"{sum(t.met_all / w for w, t in reports):.1f}/s",
        tiers_summary=" ".join(f"{t.name} {t.attainment}" for t in tiers if t.attainment) or None,
        flips=before.get("flips", 0),
        gpus=GpuCounts(budget=budget, used=used, held=held, summary=f"{used + held}/{budget}"),
        groups=GroupCounts(wanted=len(wanted), ready=len(opened)),
        agents=AgentCounts(known=len(mine_agents), connected=len(mine_agents) - len(lost)),
        tiers=tiers,
        plan=plan_status(name, judged, plan, wanted, before.get("plan") or {}, same, now),
        last_flips=last[:5] or None,
        conditions=conditions,
    )


def plan_status(
    name: str, judged: Judgement, plan: Plan | None, wanted: list[Any], before: Mapping[str, Any], same: bool, now: str
) -> PlanStatus | None:
    """The intent. Time and generation move only with the layout that is wanted."""
    pool_plan = plan.pool(name) if plan else None
    if plan is None or pool_plan is None or judged.accepted is None:
        return PlanStatus.model_validate(before) if before else None
    layout = describe(g.tp_size for g in wanted)
    places = repr(sorted((g.engine_id, g.gpu_uuids) for g in wanted))
    mark = sha256(places.encode()).hexdigest()[:12]
    changed = before.get("id") != mark
    verdict = Verdict.BLOCKED if pool_plan.verdict is Verdict.BLOCKED else Verdict.KEEP if same else Verdict.CHANGE
    keep = not changed and bool(before.get("reasons")) and verdict is Verdict.KEEP
    return PlanStatus(
        id=mark,
        generation=before.get("generation", 0) + 1 if changed else before.get("generation", 1),
        decided_at=now if changed else before.get("decidedAt", now),
        verdict=verdict.value,
        layout=layout,
        gpus=sum(g.tp_size for g in wanted),
        expected_goodput=f"{pool_plan.expected_goodput:.1f}/s",
        profile=judged.accepted.profile.name,
        profile_origin=judged.accepted.profile.origin,
        reasons=list(before["reasons"]) if keep else [r[:512] for r in pool_plan.reasons[:16]],
        rejected=[r[:512] for r in pool_plan.rejected[:8]],
    )


def layout_text(layout: Layout, pool: str) -> str:
    return describe(g.tp_size for g in layout.groups if g.pool == pool)
