"""From what is observed and accepted to a Snapshot, and from that to a Plan."""

from collections.abc import Collection, Mapping

from nitsum.demand import TierDemand
from nitsum.layout import Layout
from nitsum.perf.correction import Corrected
from nitsum.planner.planes import Planes
from nitsum.planner.types import NodeView, Plan, PlannerSettings, Snapshot
from nitsum_api.agent.v1 import agent_pb2
from nitsum_operator.accept import Accepted
from nitsum_operator.observe import Agent, layout_of, node_of, residency_of


def legal_tp(agent: Agent, elsewhere: Mapping[str, agent_pb2.ModelFacts], accepted: Mapping[str, Accepted]) -> dict[str, tuple[int, ...]]:
    """Facts where there are some, of the agent itself or of another: a node that joins must not narrow what runs on the others.

    Before: what the spec allows, which the agent then checks against the model's config.
    """
    result = {}
    for a in accepted.values():
        own = agent.facts_of(a.pool.model, a.model.source.to_proto())
        known = own if own is not None and own.legal_tp else elsewhere.get(a.pool.model)
        result[a.pool.model] = tuple(known.legal_tp) if known is not None else (a.pool.allowed_tp or (1,))
    return result


def snapshot(
    agents: Mapping[str, Agent],
    accepted: Mapping[str, Accepted],
    demand: tuple[TierDemand, ...],
    sent: Mapping[str, Layout],
    last_flip_at: Mapping[str, float],
    settings: PlannerSettings,
    carried: Collection[str] = (),
    learned: Mapping[str, Corrected] | None = None,
) -> Snapshot:
    """`sent`: layouts of the last directives; on a node that flips, that is what it will be. `learned`: by pool, in its profile's place.

    `carried`: pools that exist but have no spec in force. A node that runs one stays as it is until that is mended.
    """
    views = []
    facts: dict[str, agent_pb2.ModelFacts] = {}
    for a in accepted.values():
        source = a.model.source.to_proto()
        for n in agents.values():
            if (f := n.facts_of(a.pool.model, source)) is not None and f.legal_tp:
                facts[a.pool.model] = f
    answering = {g.uuid for a in agents.values() if a.connected for g in a.described.gpus}
    holds: dict[str, list[str]] = {}
    for agent_id, agent in sorted(agents.items()):
        flipping = agent.in_progress
        layout = sent[agent_id] if flipping and agent_id in sent else layout_of(agent.report)
        usable = agent.connected and not agent.report.draining
        if not usable:
            for g in layout.groups:
                # A GPU that another agent reports is given to that one: its own says what it holds.
                holds.setdefault(g.pool, []).extend(u for u in g.gpu_uuids if agent.connected or u not in answering)
            layout = Layout()
        views.append(
            NodeView(
                node_of(agent, legal_tp(agent, facts, accepted)),
                residency_of(agent.report),
                layout,
                {r.group.group_id: r.load.resident_tokens for r in agent.report.groups},
                flipping,
                usable and (agent.leaving or not agent.cordoned) and not any(g.pool in carried for g in layout.groups),
                last_flip_at.get(agent_id),
                agent.leaving,
            )
        )
    by_name = {a.pool.name: a for a in accepted.values()}
    return Snapshot(
        tuple(a.pool for _, a in sorted(by_name.items())),
        tuple(views),
        demand,
        {n: (learned or {}).get(n, a.profile) for n, a in by_name.items()},
        {n: (learned or {}).get(n, a.profile) for n, a in by_name.items()},
        settings,
        {p: tuple(u) for p, u in holds.items()},
    )


def decide(taken: Snapshot, now: float) -> Plan:
    """By both planes, without a memory of earlier plans."""
    return Planes()(taken, now)
