"""From agents' reports to what the planner sees."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nitsum.demand_estimate import Window
from nitsum.layout import Capacity, Group, Layout, Role, TierShare
from nitsum.length_sketch import ours
from nitsum.residency import Residency, ResidentEngine
from nitsum.topology import Gpu, Node
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import Reason
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.types.v1 import types_pb2

log = logging.getLogger(__name__)
ROLES = {types_pb2.ROLE_MIXED: Role.MIXED, types_pb2.ROLE_PREFILL: Role.PREFILL, types_pb2.ROLE_DECODE: Role.DECODE}


@dataclass
class Agent:
    """What is known of one agent. Kept when it is lost: its GPUs still count."""

    agent_id: str
    described: agent_pb2.DescribeResponse
    report: agent_pb2.NodeReport
    labels: dict[str, str] = field(default_factory=dict)
    connected: bool = True
    node_address: str = ""
    link: Any = None
    problem: str = ""
    trouble: Reason = Reason.AGENT_LOST
    """What kind of problem, while it is not connected."""
    cordoned: bool = False
    """Its Node is unschedulable: what it runs stays, nothing is added or changed."""
    leaving: bool = False
    """Its Node is tainted to be drained: what it runs goes elsewhere, where there is an elsewhere."""
    ending: bool = False
    """Its Pod is, or has gone, and its engine host with it."""

    inspected: dict[tuple[str, bytes], agent_pb2.ModelFacts] = field(default_factory=dict)
    """By model and source: what it read when it was asked."""

    def facts_of(self, model: str, source: types_pb2.ModelSource) -> agent_pb2.ModelFacts | None:
        """What it found at this very source. A problem that it remembers counts less than what it saw when it was asked again."""
        found = [*self.described.models, *self.report.models]
        # An older build does not say where it read.
        reported = next((m for m in reversed(found) if m.model == model and (not m.HasField("source") or m.source == source)), None)
        if reported is not None and not reported.problem:
            return reported
        return self.inspected.get((model, source.SerializeToString(deterministic=True)), reported)

    @property
    def in_progress(self) -> bool:
        return bool(self.report.in_progress_operation_id) or self.report.flip.outcome == agent_pb2.FlipReport.OUTCOME_RUNNING


def group_from(g: types_pb2.Group) -> Group:
    c = g.capacity
    return Group(
        g.group_id,
        g.engine_id,
        g.pool.name,
        g.model,
        g.tp_size,
        tuple(g.gpu_uuids),
        ROLES.get(g.role, Role.MIXED),
        tuple(TierShare(s.tier, s.share, s.max_running) for s in g.shares),
        Capacity(c.max_running, c.max_kv_tokens, c.prefill_tokens_per_s, c.max_queued, c.prefill_tokens_per_step),
    )


def layout_of(report: agent_pb2.NodeReport) -> Layout:
    """Groups that hold their GPUs. Those that close while others open on the same GPUs are the past."""
    groups: list[Group] = []
    used: set[str] = set()
    for r in sorted(report.groups, key=lambda r: r.state == types_pb2.GROUP_STATE_CLOSING):
        fits = len(set(r.group.gpu_uuids)) == r.group.tp_size == len(r.group.gpu_uuids) and not used & set(r.group.gpu_uuids)
        if fits and r.group.group_id not in {g.group_id for g in groups}:
            used |= set(r.group.gpu_uuids)
            groups.append(group_from(r.group))
    return Layout(tuple(sorted(groups, key=lambda g: g.group_id)))


def residency_of(report: agent_pb2.NodeReport) -> Residency:
    engines = {e.engine.engine_id: e.engine for e in report.engines if e.state != agent_pb2.EngineReport.STATE_FAILED}
    good = [ResidentEngine(i, e.model, e.tp_size, tuple(e.gpu_uuids)) for i, e in sorted(engines.items()) if len(e.gpu_uuids) == e.tp_size]
    return Residency(tuple(good))


def node_of(agent: Agent, legal_tp: Mapping[str, tuple[int, ...]]) -> Node:
    by_index: dict[int, Gpu] = {}  # names of engines are made of indexes: one that is given twice is used once
    for g in agent.described.gpus:
        if g.uuid not in {known.uuid for known in by_index.values()}:
            by_index.setdefault(g.index, Gpu(g.index, g.uuid, g.type, g.memory_bytes, g.island))
    return Node(agent.agent_id, tuple(sorted(by_index.values())), tuple(sorted(agent.labels.items())), dict(legal_tp))


def windows(report: gateway_pb2.DemandReport) -> list[Window]:
    """One gateway's report as the estimator takes it, less the tiers whose figures are no numbers: one of those would stay in every later
    estimate."""

    def counts(t: gateway_pb2.TierDemand) -> bool:
        figures = (report.window_s, t.arrivals_squared, *(s.sum for s in (t.prompt_tokens, t.output_tokens)))
        if not (sound := all(math.isfinite(f) and f >= 0 for f in figures)):
            log.warning("gateway %s: demand of %s, tier %s, left out: %s", report.gateway_id, t.pool.name, t.tier, figures)
        return sound

    def sketch(s: types_pb2.LengthSketch) -> tuple[Mapping[int, float], int, float]:
        return ours(dict(s.buckets), s.gamma), s.zero_count, s.sum

    end = report.window_end.ToNanoseconds() / 1e9
    return [
        Window(
            t.pool.name,
            t.tier,
            end,
            report.window_s,
            t.arrivals,
            t.arrivals_squared,
            t.in_flight,
            sketch(t.prompt_tokens),
            sketch(t.output_tokens),
            sketch(t.running_tokens)[0],
            report.gateway_id,
        )
        for t in report.tiers
        if counts(t)
    ]
