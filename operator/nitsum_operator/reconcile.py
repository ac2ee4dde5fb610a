"""The one loop: observe, accept, plan, intent to status, directives, routes, status. Level-triggered; every cycle starts from what is."""

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from nitsum.demand_estimate import DemandEstimator
from nitsum.faults import FaultPoint
from nitsum.perf.profile import Profile
from nitsum.planner.planes import Planes
from nitsum.planner.types import Verdict
from nitsum_api.conditions import Reason
from nitsum_api.fault import maybe_die
from nitsum_api.resources import GROUP, NODES, POOLS, VERSION
from nitsum_operator import accept, execute, inspection, links, observe, plan, remember, routes, status
from nitsum_operator.deliver import Delivery
from nitsum_operator.events import Events
from nitsum_operator.figures import Figures
from nitsum_operator.fleet import Fleet
from nitsum_operator.handlers import Store
from nitsum_operator.history import History
from nitsum_operator.issuer import RECHECK, Issuer
from nitsum_operator.leader import Leader
from nitsum_operator.learn import Learning
from nitsum_operator.settings import Settings
from nitsum_operator.write import Writer

INTERVAL_S = 1.0
SETTLE_S = 10.0
"""After taking the lead: how long to wait for agents that are announced, before planning without them."""
RENEW_S = 4.0
RELIST_S = 60.0
"""What the watches have brought is checked against a list this often: a watch that silently stands still does no lasting harm."""
NODES_AT_ONCE = 64
"""ServingNodes written in one cycle at most; the others follow in the next ones."""
log = logging.getLogger(__name__)


class Reconciler:
    def __init__(self, api: Any, namespace: str, holder: str, settings: Settings, profiles: Mapping[str, Profile], store: Store) -> None:
        self._core, self._custom, self._discovery = client.CoreV1Api(api), client.CustomObjectsApi(api), client.DiscoveryV1Api(api)
        self._namespace, self._settings, self._profiles, self._store = namespace, settings, profiles, store
        self._issuer = Issuer(self._core, namespace, settings.secrets)
        self._leader = Leader(client.CoordinationV1Api(api), namespace, holder)
        self._links, self._executor, self._estimator = links.Links(), execute.Executor(), DemandEstimator()
        self._fleet, self._history, self._figures = Fleet(), History(), Figures()
        self._delivery, self._writer = Delivery(), Writer(self._custom)
        self._events = Events(client.EventsV1Api(api), holder)
        self._planes, self._learning = Planes(), Learning(settings.online_correction)
        self._inspector = inspection.Inspector()
        self._accepted: dict[str, accept.Accepted] = {}
        self._pools: dict[str, dict[str, Any]] = {}
        """As they were judged: status must not speak of a newer generation."""
        self._reasons: dict[str, str] = {}
        """By pool: why the plan wanted what was last sent."""
        self._tls: Path | None = None
        self._tls_at = self._held_at = self._since = self._listed_at = 0.0
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
                except HTTPError as e:
                    log.warning("the API server cannot be reached: %s", e)
                except Exception:  # boundary of the loop: a bug in one cycle must not end the operator
                    log.exception("cycle failed")
                took = time.monotonic() - started
                # A fleet that is too large for one cycle a second gets fewer: half of the time is for hearing agents.
                await asyncio.sleep(max(INTERVAL_S - took, min(took, INTERVAL_S)))
        finally:
            await self._inspector.close()
            await self._links.close()
            await asyncio.to_thread(self._leader.release)
            self._issuer.close()

    async def cycle(self) -> None:
        if self._tls is None or time.monotonic() - self._tls_at > RECHECK.total_seconds():
            self._tls, self._tls_at = await asyncio.to_thread(self._issuer.ensure), time.monotonic()
        await self._find()
        if not await self._lead():
            return
        if time.monotonic() - self._listed_at > RELIST_S:
            await self._list()
        now = time.time()
        self._observe(now)
        waiting = any(k.report is None and not k.problem for k in self._links.agents.values())
        if waiting and time.monotonic() - self._since < SETTLE_S:
            return
        judged = self._judge()
        agents, sent = self._fleet.agents, {i: s.layout for i, s in self._executor.sent.items()}
        demand = self._estimator.estimate(now)
        self._executor.carried = frozenset(set(judged) - set(self._accepted))
        planner = self._settings.planner
        self._learning.hear(agents.values(), self._accepted)
        learned = self._learning.models
        taken = plan.snapshot(agents, self._accepted, demand, sent, self._history.flip_at, planner, self._executor.carried, learned)
        # In a thread, for links to be heard meanwhile; what the planes remember is theirs alone, and this call is awaited.
        decided = await asyncio.to_thread(self._planes, taken, now)
        due = [n for n in decided.nodes if self._executor.wanted(agents[n.agent_id], n, self._accepted)]
        if due:
            maybe_die(FaultPoint.OPERATOR_PLANNED)
            outdated = await self._write(judged, taken, decided, now)
            # Where a pool has changed under the plan, the next cycle plans again with what it is now.
            due = [n for n in due if not outdated & execute.concerned(agents[n.agent_id], n)]
        if due:
            maybe_die(FaultPoint.OPERATOR_INTENT_WRITTEN)
            # What only relabels groups explains no flip.
            self._reasons |= {p.pool: p.reasons[-1] for p in decided.pools if p.reasons and p.verdict is Verdict.CHANGE}
            await self._executor.send(agents, due, self._accepted, self._leader.term)
        await self._delivery.send(self._links.gateways, routes.routes(self._accepted, agents), self._leader.term)
        await self._write(judged, taken, decided, now)
        await self._events.post(self._writer.take())
        left = NODES_AT_ONCE
        for agent in list(agents.values()):
            left -= await self._writer.node(agent, status.rfc3339(now)) if left else 0
        for agent_id in list(self._fleet.removed):
            await self._writer.remove_node(agent_id)
            self._fleet.removed.discard(agent_id)

    async def _find(self) -> None:
        assert self._tls is not None
        for role, service in (("agent", self._settings.agents_service), ("gateway", self._settings.gateways_service)):
            selector = f"kubernetes.io/service-name={service}"
            found = await asyncio.to_thread(self._discovery.list_namespaced_endpoint_slice, self._namespace, label_selector=selector)
            await self._links.update(role, links.endpoints(found.items, role), self._tls)

    async def _lead(self) -> bool:
        if self._listed_at == 0:
            await self._list()  # statuses tell the terms of those who led before, should the Lease be lost
        peers = max(self._links.highest_term, self._store.highest_term)
        seen = max(peers, self._executor.stale_term, self._delivery.stale_term)
        if self._leader.term == 0 or seen > self._leader.term or time.monotonic() - self._held_at > RENEW_S:
            before = self._leader.term
            await asyncio.to_thread(self._leader.hold, seen)
            self._held_at = time.monotonic()
            if self._leader.term and not before:
                self._since, self._listed_at = time.monotonic(), 0.0
                self._executor.leads()
                await self._list()
            if self._leader.term != before:
                log.info("leading in term %d" if self._leader.term else "another operator leads (%d)", self._leader.term)
        return self._leader.term > 0

    async def _list(self) -> None:
        """Before the first plan of a term, as a watch that has not begun yet must not look like a fleet without pools or nodes; and
        again from time to time. What a watch brings meanwhile is newer, so then the next cycle lists again."""
        before = self._store.events
        pools = await asyncio.to_thread(self._custom.list_cluster_custom_object, GROUP, VERSION, POOLS)
        found = await asyncio.to_thread(self._core.list_node)
        if self._store.events != before and self._listed_at > 0:
            return
        self._store.pools = {f"{o['metadata']['namespace']}/{o['metadata']['name']}": o for o in pools["items"]}
        for gone in set(self._store.nodes) - {n.metadata.name for n in found.items}:
            self._store.lost_node(gone)
        for n in found.items:
            self._store.saw_node(n.metadata.name, n.metadata.labels or {}, [t.key for t in n.spec.taints or []], bool(n.spec.unschedulable))
        nodes = await asyncio.to_thread(self._custom.list_cluster_custom_object, GROUP, VERSION, NODES)
        self._writer.saw_nodes(nodes["items"])
        self._fleet.adopt(remember.lost_agent(o) for o in nodes["items"])
        self._listed_at = time.monotonic()

    def _observe(self, now: float) -> None:
        for agent in self._fleet.observe(self._links.agents.values(), self._store):
            self._history.note(agent, self._reasons, now)
        for link in self._links.gateways.values():
            for report in link.reports:
                self._figures.add(report)
                for window in observe.windows(report):
                    self._estimator.observe(window)
            link.reports = []
        for pool in self._accepted:
            self._estimator.freeze(pool, now, self._fleet.flipping(pool))

    def _gateways(self) -> tuple[tuple[str, str], ...]:
        """Those that are not understood or not who they should be; one that is merely away is its Deployment's business."""
        kinds = (Reason.CONTRACT_VERSION_MISMATCH, Reason.WRONG_IDENTITY)
        found = [(str(k.trouble), f"gateway {a}: {k.problem}") for a, k in self._links.gateways.items() if k.problem and k.trouble in kinds]
        return tuple(sorted(found))

    def _judge(self) -> dict[str, accept.Judgement]:
        pools, types = dict(self._store.pools), self._fleet.gpu_types
        self._pools = pools
        for key, obj in pools.items():
            self._history.adopt(key, obj.get("status") or {})
            if key not in self._accepted and (before := remember.spec_in_force(obj, types, self._profiles)) is not None:
                self._accepted[key] = before
        specs, agents = inspection.newest(pools), self._fleet.agents
        both = [*((a.pool, a.model) for a in self._accepted.values()), *specs.values()]
        self._inspector.look(both, agents)
        pending = {k for k, (pool, model) in specs.items() if self._inspector.pending(pool, model, agents)}
        facts = self._fleet.facts(specs.values())
        judged = accept.judge(pools, facts, types, self._profiles, self._executor.illegal, self._accepted, pending)
        self._accepted = {k: j.accepted for k, j in judged.items() if j.accepted is not None}
        return judged

    async def _write(self, judged: Mapping[str, accept.Judgement], taken: Any, decided: Any, now: float) -> set[str]:
        """Pools that have changed since they were judged."""
        sent = self._executor.sent
        rejections = {i: s.rejected.message for i, s in sent.items() if s.rejected is not None}
        operations = {i: s.directive.operation_id for i, s in sent.items()}
        agents, strangers, gateways = self._fleet.agents, self._fleet.strangers, self._gateways()
        seen = status.Seen(taken, decided, agents, strangers, self._figures, rejections, operations, self._leader.term, now, gateways)
        outdated = set()
        for key, j in judged.items():
            if key not in self._store.pools:
                outdated.add(key)
                continue
            obj = self._pools[key]
            before = self._writer.before(key, obj)
            new = status.pool_status(obj, j, seen, before, self._history.last(key), self._history.total(key))
            if not await self._writer.pool(key, obj, new):
                outdated.add(key)
        self._writer.forget(self._store.pools)
        self._history.keep(self._store.pools, agents)
        self._executor.keep(agents, self._store.pools)
        self._figures.keep(self._store.pools)
        self._events.keep(self._store.pools)
        for gone in {pool for pool, _ in self._estimator.tiers} - set(self._store.pools):
            self._estimator.forget(gone)
        return outdated
