"""All agents, those that are lost included, from links and from what the API server says of their nodes."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from nitsum.pool import Pool
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import Reason
from nitsum_api.resources import ModelSpec
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.handlers import Store
from nitsum_operator.links import Link
from nitsum_operator.observe import Agent

LOST_AFTER_S = 10.0


def _read_at(fact: agent_pb2.ModelFacts, source: types_pb2.ModelSource) -> agent_pb2.ModelFacts:
    found = agent_pb2.ModelFacts()
    found.CopyFrom(fact)
    found.source.CopyFrom(source)
    return found


def _fresh(link: Link) -> bool:
    return link.heard_at is not None and time.monotonic() - link.heard_at < LOST_AFTER_S


@dataclass
class Fleet:
    """`agents` by agent id. A lost one stays, and its GPUs count as used, until its Node is deleted or tainted out of service."""

    agents: dict[str, Agent] = field(default_factory=dict)
    strangers: tuple[tuple[str, str], ...] = ()
    """(reason, message) of peers that are announced but were never understood."""
    removed: set[str] = field(default_factory=set)
    """Agents whose ServingNode shall go; whoever deletes it takes the id out."""
    _gone: set[str] = field(default_factory=set)
    """Of which that was said already."""

    def adopt(self, lost: Iterable[Agent | None]) -> None:
        """Agents that an earlier leader knew, until they are heard of again."""
        for agent in lost:
            if agent is not None and agent.agent_id and agent.agent_id not in self.agents:
                self.agents[agent.agent_id] = agent

    def observe(self, links: Iterable[Link], store: Store) -> list[Agent]:
        """The agents that report now."""
        links = list(links)
        heard, twice = self._once([link for link in links if link.described is not None and link.report is not None])
        seen = [self._heard(link, store) for link in heard]
        answering = {a.agent_id for a in seen if a.connected}
        uuids = {g.uuid for a in seen if a.connected for g in a.described.gpus}
        self._gone -= answering
        self.removed -= answering
        by_address = {link.endpoint.address: link for link in links}
        for agent_id in set(self.agents) - answering:
            self._lose(self.agents[agent_id], by_address, store, uuids)
        known = {a.link.endpoint.address for a in self.agents.values() if a.link is not None}
        self.strangers = tuple(
            (str(link.trouble), f"{link.endpoint.address}: {link.problem}")
            for link in links
            if link.problem and link.described is None and link.endpoint.address not in known
        ) + tuple(
            (str(Reason.WRONG_IDENTITY), f"{link.endpoint.address}: says that it is agent {link.described.agent_id!r}, as another does")
            for link in twice
        )
        return seen

    def _once(self, links: list[Link]) -> tuple[list[Link], list[Link]]:
        """One link for each agent id, and the others: where two claim one, it is who had it before and still reports."""

        def rank(link: Link) -> tuple[bool, bool]:
            known = self.agents.get(link.described.agent_id)
            had = known is not None and known.link is not None and known.link.endpoint.address == link.endpoint.address
            return not _fresh(link), not had

        first: dict[str, Link] = {}
        for link in sorted(links, key=rank):
            first.setdefault(link.described.agent_id, link)
        return [k for k in links if first[k.described.agent_id] is k], [k for k in links if first[k.described.agent_id] is not k]

    def _heard(self, link: Link, store: Store) -> Agent:
        d, report = link.described, link.report
        name = d.node_name or link.endpoint.node_name
        labels = {**store.nodes.get(name, {}), "nitsum.io/node-group": d.node_group}
        fresh = _fresh(link)
        trouble = link.trouble if link.problem else Reason.STALE_REPORTS
        address = link.endpoint.node_address or d.node_address
        problem = link.problem or ("" if fresh else f"no report for {LOST_AFTER_S:g} s")
        agent = Agent(d.agent_id, d, report, labels, fresh, address, link, problem, trouble)
        agent.cordoned, agent.leaving, agent.ending = name in store.cordoned, name in store.draining, link.endpoint.terminating
        self.agents[d.agent_id] = agent
        return agent

    def _lose(self, agent: Agent, by_address: dict[str, Link], store: Store, answering: set[str]) -> None:
        """`answering`: GPUs of agents that report."""
        link = by_address.get(agent.link.endpoint.address) if agent.link is not None else None
        node = agent.described.node_name
        agent.connected = False
        agent.ending = link is None or link.endpoint.terminating
        agent.labels = {**store.nodes.get(node, {}), "nitsum.io/node-group": agent.described.node_group}
        if link is not None and link.problem:
            agent.problem, agent.trouble = link.problem, link.trouble
        elif link is None:
            agent.problem, agent.trouble = agent.problem or "its endpoint is gone", Reason.AGENT_LOST
        # A pod that follows another on its node has all of its GPUs, so the other one holds nothing.
        replaced = link is None and bool(agent.described.gpus) and all(g.uuid in answering for g in agent.described.gpus)
        if store.may_hold(node) and not replaced:
            return
        del self.agents[agent.agent_id]
        if (replaced or node not in store.nodes) and agent.agent_id not in self._gone:
            self._gone.add(agent.agent_id)
            self.removed.add(agent.agent_id)

    def facts(self, specs: Iterable[tuple[Pool, ModelSpec]]) -> dict[str, list[agent_pb2.ModelFacts]]:
        """By model: what agents that the pool may use read in its checkpoint. One that is lost has no say in what is wrong."""
        found: dict[str, list[agent_pb2.ModelFacts]] = {}
        for pool, spec in specs:
            source = spec.source.to_proto()
            for agent in self.agents.values():
                fact = agent.facts_of(spec.name, source) if set(pool.node_selector) <= set(agent.labels.items()) else None
                if fact is not None and (agent.connected or not fact.problem):
                    found.setdefault(spec.name, []).append(_read_at(fact, source))
        return found

    @property
    def gpu_types(self) -> tuple[str, ...]:
        return tuple(sorted({g.type for a in self.agents.values() for g in a.described.gpus}))

    def flipping(self, pool: str) -> frozenset[str]:
        """Tiers that groups of the pool serve on nodes with a directive in work. One that is lost is not known to work on anything."""
        groups = (g.group for a in self.agents.values() if a.connected and a.in_progress for g in a.report.groups)
        return frozenset(s.tier for g in groups if g.pool.name == pool for s in g.shares)
