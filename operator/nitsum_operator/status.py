"""What people see of a pool: conditions, counts, the plan and why. Pure; written once per cycle, and only when it changed."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from nitsum.layout import ORDER, Group, Layout, Role, sort_of
from nitsum.planner.types import Plan, Snapshot, TierOutlook, Verdict
from nitsum_api.conditions import PoolCondition, Reason, summary_reason
from nitsum_api.resources import (
    AcceptedSpec,
    AgentCounts,
    FlipStatus,
    GpuCounts,
    GroupCounts,
    PlanStatus,
    PoolStatus,
    TierStatus,
)
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Judgement
from nitsum_operator.figures import Figures
from nitsum_operator.observe import Agent, group_from
from nitsum_operator.standing import Standing, condition

OUTCOMES: dict[int, Any] = {1: "Running", 2: "Done", 3: "Reverted", 4: "Failed"}


SPEC_KEPT_MAX = 32768


def rfc3339(t: float) -> str:
    return datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe(groups: Iterable[Group]) -> str:
    """E.g. `2xTP1 1xTP2`; with roles `1xTP2 + 2xTP1 prefill + 1xTP2 decode`."""
    many = Counter((ORDER.index(g.role), g.tp_size) for g in groups)
    mixed = all(ORDER[role] is Role.MIXED for role, _ in many)
    return (" " if mixed else " + ").join(f"{n}x{sort_of(tp, ORDER[role])}" for (role, tp), n in sorted(many.items()))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def tier_rows(name: str, figures: Figures, tiers: Iterable[str], plan: Mapping[str, TierOutlook], now: float) -> list[TierStatus]:
    """Measured over the last minute; feasible and binding as planned."""
    result = []
    for tier in tiers:
        f, outlook = figures.tier(name, tier, now), plan.get(tier)
        row: dict[str, Any] = {
            "name": tier,
            "rate": f"{f.rate:.1f}/s",
            "attainment": _percent(f.attainment),
            "goodput": f"{f.goodput:.1f}/s",
            "feasible": outlook.feasible if outlook else None,
            "slack": f"{min(outlook.slack, 99):.1f}x" if outlook else None,
            "binding": outlook.binding[:128] if outlook else None,
        }
        for kind, sketch in (("ttft", f.ttft_ms), ("tpot", f.tpot_ms)):
            if sketch.count > 0:
                row |= {f"{kind}P{q}Ms": round(sketch.quantile(q / 100), 1) for q in (50, 99)}
        result.append(TierStatus.model_validate(row))
    return result


def serving(groups: Iterable[Group]) -> str:
    """E.g. `2xTP1 chat+batch, 1xTP2 prefill strict`: TP, role and the tiers that groups are for. A tier with next to no share only rides
    along."""
    kinds = Counter((ORDER.index(g.role), g.tp_size, "+".join(s.tier for s in g.shares if s.share > 1.5e-3) or "none") for g in groups)
    return ", ".join(f"{n}x{sort_of(tp, ORDER[role])} {tiers}" for (role, tp, tiers), n in sorted(kinds.items()))


FIGURES = {"attainment", "goodput", "tiersSummary", "tiers"}


def without_figures(status: Mapping[str, Any]) -> dict[str, Any]:
    """What people would miss if it came half a minute late: conditions, layout, plan, flips; but not figures that move all the time.

    Feasible is one of them: at its edge it follows every step of the demand estimate.
    """
    plan = {k: v for k, v in (status.get("plan") or {}).items() if k not in ("expectedGoodput", "rejected", "reasons", "remedies")}
    conditions = [c for c in status.get("conditions") or [] if c["type"] != PoolCondition.FEASIBLE]
    reason = None if status.get("reason") == Reason.SLO_INFEASIBLE else status.get("reason")
    return {**{k: v for k, v in status.items() if k not in FIGURES}, "plan": plan, "conditions": conditions, "reason": reason}


@dataclass(frozen=True)
class Seen:
    """All that a status is made of, besides the pool itself. `strangers`: peers that were never understood, each with why.

    `rejections`: by agent, of the last directive. `operations`: by agent, ids of the last directives. `now`: Unix seconds.
    """

    taken: Snapshot
    plan: Plan
    agents: Mapping[str, Agent]
    strangers: tuple[tuple[str, str], ...]
    figures: Figures
    rejections: Mapping[str, str]
    operations: Mapping[str, str]
    term: int
    now: float
    gateways: tuple[tuple[str, str], ...] = ()
    """(reason, message) of gateways that are left alone."""


def pool_status(
    obj: Mapping[str, Any], judged: Judgement, seen: Seen, before: Mapping[str, Any], flips: list[FlipStatus], flips_total: int
) -> PoolStatus:
    """`before`: the status as it stands. `flips`: the last ones."""
    meta, plan, a = obj["metadata"], seen.plan, judged.accepted
    name, generation = f"{meta['namespace']}/{meta['name']}", meta.get("generation", 0)
    selector = set(a.pool.node_selector) if a else set()
    agents = tuple(x for x in seen.agents.values() if selector <= set(x.labels.items()))
    groups = tuple(r for x in agents if x.connected for r in x.report.groups if r.group.pool.name == name)
    opened = [r for r in groups if r.state == types_pb2.GROUP_STATE_OPEN]
    wanted = [g for n in plan.nodes for g in n.layout.groups if g.pool == name]
    places = frozenset((g.engine_id, g.gpu_uuids, g.role) for g in wanted)
    runs = frozenset((g.engine_id, g.gpu_uuids, g.role) for g in map(group_from, (r.group for r in opened)))
    pool_plan = plan.pool(name)
    outlook = {t.tier: t for t in pool_plan.tiers} if pool_plan else {}
    held = len(set(seen.taken.holds.get(name, ())) - {u for r in groups for u in r.group.gpu_uuids})
    standing = Standing(judged, pool_plan, agents, seen.strangers, groups, places, runs, seen.rejections, held, seen.gateways)
    old = {c["type"]: c for c in before.get("conditions") or []}
    conditions = [condition(k, *row, old, rfc3339(seen.now), generation) for k, row in standing.rows().items()]
    names = [t.name for t in a.pool.tiers] if a else []
    tiers = tier_rows(name, seen.figures, names, outlook, seen.now)
    used = sum(r.group.tp_size for r in groups)
    budget = a.pool.budget_gpus if a else obj["spec"]["budget"]["gpus"]
    figures = [seen.figures.tier(name, t, seen.now) for t in names]
    finished, good = sum(f.finished for f in figures), sum(f.met_all for f in figures)
    return PoolStatus(
        observed_generation=generation,
        term=seen.term,
        reason=summary_reason(conditions),
        layout=describe(group_from(r.group) for r in opened),
        attainment=_percent(good / finished) if finished else before.get("attainment"),
        goodput=f"{sum(f.goodput for f in figures):.1f}/s",
        tiers_summary=" ".join(f"{t.name} {t.attainment}" for t in tiers if t.attainment)[:1024] or None,
        flips=flips_total,
        gpus=GpuCounts(budget=budget, used=used, held=held, summary=f"{used + held}/{budget}"),
        groups=GroupCounts(wanted=len(wanted), ready=len(opened)),
        agents=AgentCounts(known=len(agents), connected=len(agents) - len(standing.lost)),
        tiers=tiers,
        plan=plan_status(name, judged, plan, wanted, before.get("plan") or {}, places == runs, seen),
        accepted=_in_force(obj, judged, before),
        last_flips=flips or None,
        conditions=conditions,
    )


def plan_status(
    name: str, judged: Judgement, plan: Plan, wanted: list[Any], before: Mapping[str, Any], same: bool, seen: Seen
) -> PlanStatus | None:
    """The intent. Time and generation move only with the layout that is wanted."""
    pool_plan, now = plan.pool(name), rfc3339(seen.now)
    if pool_plan is None or judged.accepted is None:
        return PlanStatus.model_validate(before) if before else None
    layout = describe(wanted)
    places = repr(sorted((g.engine_id, g.gpu_uuids, *([] if g.role is Role.MIXED else [g.role.value])) for g in wanted))
    mark = sha256(places.encode()).hexdigest()[:12]
    changed = before.get("id") != mark
    verdict = Verdict.BLOCKED if pool_plan.verdict is Verdict.BLOCKED else Verdict.KEEP if same else Verdict.CHANGE
    nodes = {n.agent_id for n in plan.nodes if any(g.pool == name for g in n.layout.groups)}
    operations = " ".join(sorted(seen.operations[i] for i in nodes if i in seen.operations))[:128] or None
    if _changes(before.get("operationId")) == _changes(operations):
        operations = before.get("operationId")  # only limits were sent anew
    # Why this layout: said when it was decided. What holds it back while it is carried out, e.g. its own flip, is no reason for it.
    keep = not changed and bool(before.get("reasons")) and Verdict.BLOCKED.value not in (verdict.value, before.get("verdict"))
    return PlanStatus(
        id=mark,
        generation=before.get("generation", 0) + 1 if changed else before.get("generation", 1),
        operation_id=operations,
        decided_at=now if changed else before.get("decidedAt", now),
        verdict=verdict.value,
        layout=layout,
        gpus=sum(g.tp_size for g in wanted),
        expected_goodput=f"{pool_plan.expected_goodput:.1f}/s",
        profile=judged.accepted.profile.name,
        profile_origin=seen.taken.step_times[name].origin[:64] if name in seen.taken.step_times else judged.accepted.profile.origin,
        serving=serving(wanted)[:512],
        held=pool_plan.held[:512] or None,
        reasons=list(before["reasons"]) if keep else [r[:512] for r in pool_plan.reasons[:16]],
        rejected=[r[:512] for r in pool_plan.rejected[:8]],
        remedies=[r[:512] for r in pool_plan.remedies[:8]] or None,
    )


def _changes(operations: str | None) -> list[str]:
    """Operation ids without their counters."""
    return [o.partition(".")[0] for o in (operations or "").split()]


def _in_force(obj: Mapping[str, Any], judged: Judgement, before: Mapping[str, Any]) -> AcceptedSpec | None:
    """The newest spec where it was accepted; else what stood there before."""
    kept = before.get("accepted")
    if judged.accepted is not None and judged.accepted.generation == obj["metadata"].get("generation", 0):
        text = json.dumps(obj["spec"], sort_keys=True, separators=(",", ":"))
        return AcceptedSpec(generation=judged.accepted.generation, spec=text) if len(text) <= SPEC_KEPT_MAX else None
    return AcceptedSpec.model_validate(kept) if kept and (judged.accepted is not None or judged.status == "Unknown") else None


def layout_text(layout: Layout, pool: str) -> str:
    return describe(g for g in layout.groups if g.pool == pool)
