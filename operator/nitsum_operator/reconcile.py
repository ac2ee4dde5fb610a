"""The one loop: observe, accept, plan, intent to status, directives, routes, status. Level-triggered; every cycle starts from what is."""

import asyncio
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from nitsum.demand_estimate import DemandEstimator
from nitsum.faults import FaultPoint
from nitsum.layout import Layout
from nitsum.perf.profile import Profile
from nitsum.planner.types import Plan, Snapshot
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.fault import maybe_die
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.resources import GROUP, NODES, POOLS, VERSION, FlipStatus
from nitsum_operator import accept, execute, links, nodes, observe, plan, routes, status
from nitsum_operator.handlers import Store
from nitsum_operator.issuer import RECHECK, Issuer
from nitsum_operator.leader import Leader
from nitsum_operator.settings import Settings

INTERVAL_S = 1.0
SETTLE_S = 10.0
"""After taking the lead: how long to wait for agents that are announced, before planning without them."""
RENEW_S = 4.0
LOST_AFTER_S = 10.0
log = logging.getLogger(__name__)


def _text(t: float) -> str:
    return datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Reconciler:
    def __init__(self, api: Any, namespace: str, holder: str, settings: Settings, profiles: Mapping[str, Profile], store: Store) -> None:
        self._core, self._custom, self._discovery = client.CoreV1Api(api), client.CustomObjectsApi(api), client.DiscoveryV1Api(api)
        self._namespace, self._settings, self._profiles, self._store = namespace, settings, profiles, store
        self._issuer = Issuer(self._core, namespace, settings.secrets)
        self._leader = Leader(client.CoordinationV1Api(api), namespace, holder)
        self._links, self._executor, self._estimator = links.Links(), execute.Executor(), DemandEstimator()
        self._accepted: dict[str, accept.Accepted] = {}
        self._agents: dict[str, observe.Agent] = {}
        self._flip_at: dict[str, float] = {}
        self._layouts: dict[str, Layout] = {}
        """By agent: what stood when nothing was in progress."""
        self._flip_seen: dict[str, tuple[str, int]] = {}
        self._flips: dict[str, list[FlipStatus]] = {}
        self._counted: dict[str, int] = {}
        self._routes: dict[str, tuple[int, bytes]] = {}
        self._written: dict[str, Any] = {}
        self._tls: Path | None = None
        self._tls_at = self._held_at = self._since = 0.0
        self.beat = time.monotonic()

    async def run(self) -> None:
        """For ever. One failed cycle is logged and the next one starts over."""
        try:
            while True:
                started = time.monotonic()
                try:
                    await self.cycle()
                    self.beat = time.monotonic()
                except ApiException as e:
                    log.warning("the API server answered %s %s: %s", e.status, e.reason, (e.body or "")[:300])
                except Exception:  # boundary of the loop: a bug in one cycle must not end the operator
                    log.exception("cycle failed")
                await asyncio.sleep(max(INTERVAL_S - (time.monotonic() - started), 0.05))
        finally:
            await self._links.close()
            await asyncio.to_thread(self._leader.release)
            self._issuer.close()

    async def cycle(self) -> None:
        if self._tls is None or time.monotonic() - self._tls_at > RECHECK.total_seconds():
            self._tls, self._tls_at = await asyncio.to_thread(self._issuer.ensure), time.monotonic()
        await self._find()
        if not await self._lead():
            return
        self._observe()
        if any(k.report is None and not k.mismatch for k in self._links.agents.values()) and time.monotonic() - self._since < SETTLE_S:
            return
        now = time.time()
        facts: dict[str, list[agent_pb2.ModelFacts]] = {}
        for agent in self._agents.values():
            for model, fact in agent.facts.items():
                facts.setdefault(model, []).append(fact)
        types = tuple(sorted({g.type for a in self._agents.values() for g in a.described.gpus}))
        judged = accept.judge(dict(self._store.pools), facts, types, self._profiles, self._executor.illegal, self._accepted)
        self._accepted = {k: j.accepted for k, j in judged.items() if j.accepted is not None}
        sent = {i: s.layout for i, s in self._executor.sent.items()}
        taken = plan.snapshot(self._agents, self._accepted, self._estimator.estimate(now), sent, self._flip_at, self._settings.planner)
        decided = plan.decide(taken, now)
        due = [n for n in decided.nodes if self._executor.wanted(self._agents[n.agent_id], n, self._accepted)]
        if due:
            maybe_die(FaultPoint.OPERATOR_PLANNED)
            await self._write(judged, taken, decided, now)
            maybe_die(FaultPoint.OPERATOR_INTENT_WRITTEN)
            await self._executor.send(self._agents, due, self._accepted, self._leader.term)
        await self._route()
        await self._write(judged, taken, decided, now)
        await self._write_nodes(now)

    async def _find(self) -> None:
        assert self._tls is not None
        for role, service in (("agent", self._settings.agents_service), ("gateway", self._settings.gateways_service)):
            selector = f"kubernetes.io/service-name={service}"
            found = await asyncio.to_thread(self._discovery.list_namespaced_endpoint_slice, self._namespace, label_selector=selector)
            await self._links.update(role, links.endpoints(found.items, role), self._tls)

    async def _lead(self) -> bool:
        seen = max(self._links.highest_term, self._executor.stale_term)
        if self._leader.term == 0 or seen > self._leader.term or time.monotonic() - self._held_at > RENEW_S:
            before = self._leader.term
            await asyncio.to_thread(self._leader.hold, seen)
            self._held_at = time.monotonic()
            if self._leader.term and not before:
                self._since = time.monotonic()
                await self._list()
            if self._leader.term != before:
                log.info("leading in term %d" if self._leader.term else "another operator leads (%d)", self._leader.term)
        return self._leader.term > 0

    async def _list(self) -> None:
        """Before the first plan of a term: a watch that has not begun yet must not look like a fleet without pools."""
        pools = await asyncio.to_thread(self._custom.list_cluster_custom_object, GROUP, VERSION, POOLS)
        self._store.pools = {f"{o['metadata']['namespace']}/{o['metadata']['name']}": o for o in pools["items"]}
        found = await asyncio.to_thread(self._core.list_node)
        self._store.nodes = {n.metadata.name: dict(n.metadata.labels or {}) for n in found.items}

    def _observe(self) -> None:
        present = set()
        for link in self._links.agents.values():
            if link.described is None or link.report is None:
                continue
            agent_id = link.described.agent_id
            present.add(agent_id)
            fresh = link.heard_at is not None and time.monotonic() - link.heard_at < LOST_AFTER_S and not link.mismatch
            name = link.described.node_name or link.endpoint.node_name
            labels = {**self._store.nodes.get(name, {}), "nitsum.io/node-group": link.described.node_group}
            address = link.described.node_address or link.endpoint.node_address
            self._agents[agent_id] = observe.Agent(agent_id, link.described, link.report, labels, fresh, address, link, link.problem)
            self._note_flip(self._agents[agent_id])
        for agent_id in set(self._agents) - present:
            agent = self._agents[agent_id]
            agent.connected, agent.problem = False, agent.problem or "its endpoint is gone"
            if agent.described.node_name not in self._store.nodes:
                del self._agents[agent_id]  # the Node was deleted: its GPUs are free of it
        for link in self._links.gateways.values():
            for report in link.reports:
                for window in observe.windows(report):
                    self._estimator.observe(window)
            link.reports = []
        now = time.time()
        for pool in self._accepted:
            flipping = any(a.in_progress and any(g.group.pool.name == pool for g in a.report.groups) for a in self._agents.values())
            self._estimator.freeze(pool, now, flipping)

    def _note_flip(self, agent: observe.Agent) -> None:
        flip = agent.report.flip
        mark = (flip.operation_id, flip.outcome)
        before = self._layouts.get(agent.agent_id)
        layout = observe.layout_of(agent.report)
        if not agent.in_progress:
            self._layouts[agent.agent_id] = layout
        if before is None:
            self._flip_seen[agent.agent_id] = mark  # of an earlier leader's time
        if self._flip_seen.get(agent.agent_id) == mark or flip.outcome == agent_pb2.FlipReport.OUTCOME_RUNNING or before is None:
            return
        self._flip_seen[agent.agent_id] = mark
        self._flip_at[agent.agent_id] = time.time()
        for pool in {g.pool for g in layout.groups}:
            old = status.layout_text(before, pool)
            if not old:
                continue  # the first layout is no flip
            entry = FlipStatus(
                time=_text(time.time()),
                operation_id=flip.operation_id,
                agent_id=agent.agent_id,
                **{"from": old},
                to=status.layout_text(layout, pool),
                outcome=status.OUTCOMES.get(flip.outcome, "Failed"),
                streams_moved=flip.streams_moved,
                pause_ms=sum(p.duration_ms for p in flip.phases),
            )
            self._flips[pool] = [entry, *self._flips.get(pool, [])][:5]
            self._counted[pool] = self._counted.get(pool, 0) + 1

    async def _route(self) -> None:
        wanted = routes.routes(self._accepted, self._agents)
        body = gateway_pb2.ApplyRoutesRequest(pools=wanted).SerializeToString(deterministic=True)
        for address, link in self._links.gateways.items():
            if link.described is None:
                continue
            generation, last = self._routes.get(address, (0, b""))
            reported = max(link.described.routes_generation, link.report.routes_generation if link.report else 0)
            lost = link.report is not None and generation > 0 and link.report.routes_generation == 0
            if last == body and not lost:
                continue
            generation = max(generation, reported) + 1
            request = gateway_pb2.ApplyRoutesRequest(
                contract_version=CONTRACT_VERSION, term=self._leader.term, generation=generation, pools=wanted
            )
            try:
                answer = await link.stub.ApplyRoutes(request, timeout=links.CALL_S)
            except grpc.aio.AioRpcError as e:
                log.warning("gateway %s did not take routes: %s %s", address, e.code().name, e.details())
                continue
            if answer.WhichOneof("answer") == "rejected":
                log.warning("gateway %s rejected routes: %s", address, answer.rejected.message)
                self._executor.stale_term = max(self._executor.stale_term, answer.rejected.highest_term)
                self._routes[address] = (generation, b"")
            else:
                self._routes[address] = (generation, body)

    async def _write(self, judged: Mapping[str, accept.Judgement], taken: Snapshot, decided: Plan, now: float) -> None:
        rejections = {i: s.rejected.message for i, s in self._executor.sent.items() if s.rejected is not None}
        reports = [k.report for k in self._links.gateways.values() if k.report is not None]
        for key, j in judged.items():
            obj = self._store.pools.get(key)
            if obj is None:
                continue
            # What was written last is newer than what the watch has brought back.
            base = {**obj, "status": self._written.get(key, obj.get("status") or {})}
            new = status.pool_status(
                base, j, taken, decided, self._agents, reports, rejections, self._flips, self._leader.term, _text(now)
            ).dump()
            new["flips"] = new.get("flips", 0) + self._counted.pop(key, 0)
            if new == base["status"]:
                continue
            patch = {"status": {**dict.fromkeys(set(base["status"]) - set(new)), **new}}
            namespace, _, name = key.partition("/")
            try:
                await asyncio.to_thread(self._custom.patch_namespaced_custom_object_status, GROUP, VERSION, namespace, POOLS, name, patch)
                self._written[key] = new
            except ApiException as e:
                if e.status != 404:
                    raise
        for gone in set(self._written) - set(self._store.pools) - {f"node {i}" for i in self._agents}:
            del self._written[gone]

    async def _write_nodes(self, now: float) -> None:
        for agent_id, agent in self._agents.items():
            key = f"node {agent_id}"
            if key not in self._written:
                try:
                    found = await asyncio.to_thread(self._custom.get_cluster_custom_object, GROUP, VERSION, NODES, agent_id)
                except ApiException as e:
                    if e.status != 404:
                        raise
                    found = await asyncio.to_thread(
                        self._custom.create_cluster_custom_object, GROUP, VERSION, NODES, nodes.node_object(agent)
                    )
                self._written[key] = found.get("status") or {}
            new = nodes.node_status(agent, self._written[key], _text(now)).dump()
            if new != self._written[key]:
                await asyncio.to_thread(self._custom.patch_cluster_custom_object_status, GROUP, VERSION, NODES, agent_id, {"status": new})
                self._written[key] = new
