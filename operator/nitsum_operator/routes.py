"""From reports to what gateways serve: groups that exist, with the epochs that their nodes say."""

from collections.abc import Mapping

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import Reason
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.security import dns_name
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Accepted
from nitsum_operator.execute import tier_proto
from nitsum_operator.observe import Agent

SERVABLE = (types_pb2.GROUP_STATE_OPEN, types_pb2.GROUP_STATE_OPENING)


def _groups(agent: Agent, pool: str) -> list[types_pb2.Group]:
    found = [r.group for r in agent.report.groups if r.group.pool.name == pool and r.state in SERVABLE]
    return sorted(found, key=lambda g: g.group_id)


def unready(name: str, agents: Mapping[str, Agent]) -> str:
    """Why nothing serves the pool; clients read it."""
    mine = [(r, a) for a in agents.values() for r in a.report.groups if r.group.pool.name == name]
    if not agents:
        return "no node is connected yet"
    if any(r.state == types_pb2.GROUP_STATE_FAILED for r, _ in mine):
        return "its engines failed; they are being started again"
    engines = [e for a in agents.values() for e in a.report.engines]
    starting = sum(e.state in (agent_pb2.EngineReport.STATE_STARTING, agent_pb2.EngineReport.STATE_WARMING) for e in engines)
    return f"engines are starting ({len(engines) - starting} of {len(engines)} ready)" if engines else "engines are starting"


def may_serve(agent: Agent) -> bool:
    """Its host goes on without it, so whether one that is merely away serves is for gateways to find out."""
    return agent.connected or (agent.trouble in (Reason.AGENT_LOST, Reason.STALE_REPORTS) and not agent.ending)


def routes(accepted: Mapping[str, Accepted], agents: Mapping[str, Agent]) -> list[gateway_pb2.PoolRoute]:
    """Sorted, so that equal states give equal routes. Load is left out: it is the nodes' own fresh news."""
    result = []
    for name, a in sorted(accepted.items()):
        route = gateway_pb2.PoolRoute(
            pool=types_pb2.PoolRef(name=name, uid=a.pool.uid),
            model=a.model.to_proto(),
            tiers=[tier_proto(t, a.pool.default_tier) for t in a.pool.tiers],
        )
        for _, agent in sorted(agents.items()):
            if may_serve(agent) and (fact := agent.facts_of(a.pool.model, route.model.source)):
                route.model.revision = fact.revision
        serving = [(i, x, groups) for i, x in sorted(agents.items()) if may_serve(x) and (groups := _groups(x, name))]
        # Streams leave a Pod that is ending while there is time, if they have where to go.
        stay = [row for row in serving if not row[1].ending]
        for agent_id, agent, groups in stay or serving:
            node = route.nodes.add(address=agent.node_address, tls_name=dns_name("host"), agent_id=agent_id)
            node.groups.extend(groups)
        if not route.nodes:
            route.unready_reason = unready(name, agents)
        result.append(route)
    return result
