"""From a plan to directives: absolute, sent only when they differ in what runs, with the leader's term."""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import grpc

from nitsum.faults import FaultPoint
from nitsum.layout import FlipMode, Group, Layout, Role
from nitsum.planner.types import NodePlan
from nitsum.pool import Tier
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.fault import maybe_die
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Accepted
from nitsum_operator.drift import REFRESH_S, drifted
from nitsum_operator.observe import Agent, layout_of

DEADLINE_S = 120
RETRY_S = 5.0
CALL_S = 10.0
REJECTED = agent_pb2.ApplyResponse.Rejected
MODES = {
    FlipMode.ABORT: types_pb2.FLIP_MODE_ABORT,
    FlipMode.LET_FINISH: types_pb2.FLIP_MODE_LET_FINISH,
    FlipMode.MIGRATE_FIRST: types_pb2.FLIP_MODE_MIGRATE_FIRST,
}
ROLES = {Role.MIXED: types_pb2.ROLE_MIXED, Role.PREFILL: types_pb2.ROLE_PREFILL, Role.DECODE: types_pb2.ROLE_DECODE}
log = logging.getLogger(__name__)


def tier_proto(t: Tier, default: Tier) -> types_pb2.Tier:
    return types_pb2.Tier(
        name=t.name, ttft_ms=t.ttft_ms or 0, tpot_ms=t.tpot_ms or 0, target=t.target, weight=t.weight, is_default=t is default
    )


def group_proto(g: Group, uid: str, epoch: int = 0) -> types_pb2.Group:
    c = g.capacity
    return types_pb2.Group(
        group_id=g.group_id,
        epoch=epoch,
        pool=types_pb2.PoolRef(name=g.pool, uid=uid),
        engine_id=g.engine_id,
        model=g.model,
        tp_size=g.tp_size,
        gpu_uuids=g.gpu_uuids,
        role=ROLES[g.role],
        shares=[types_pb2.TierShare(tier=s.tier, share=s.share, max_running=s.max_running) for s in g.shares],
        capacity=types_pb2.Capacity(
            max_running=c.max_running,
            max_kv_tokens=c.max_kv_tokens,
            prefill_tokens_per_s=c.prefill_tokens_per_s,
            max_queued=c.max_queued,
            prefill_tokens_per_step=c.prefill_tokens_per_step,
        ),
    )


def digest(node: NodePlan, pools: Mapping[str, Accepted]) -> str:
    """Of what runs where for whom. Shares and capacities are not part of it: see `drift`."""
    groups = [(g.group_id, g.pool, g.model, g.gpu_uuids, g.role, tuple(s.tier for s in g.shares)) for g in node.layout.groups]
    names = {g.pool for g in node.layout.groups} | {
        n for n, a in pools.items() if any(e.model == a.pool.model for e in node.residency.engines)
    }
    specs = [(n, pools[n].pool.uid, pools[n].pool.tiers, pools[n].model) for n in sorted(names) if n in pools]
    return hashlib.sha256(repr((node.agent_id, groups, node.residency, specs)).encode()).hexdigest()[:16]


def directive(node: NodePlan, pools: Mapping[str, Accepted], generation: int, term: int, now: float) -> agent_pb2.NodeDirective:
    """The whole of what the node shall hold. `now`: Unix seconds."""
    used = {g.model for g in node.layout.groups} | {e.model for e in node.residency.engines}
    result = agent_pb2.NodeDirective(
        operation_id=f"{digest(node, pools)}.{generation}",
        generation=generation,
        term=term,
        mode=MODES[node.mode],
        let_finish_ms=round(node.let_finish_s * 1e3),
        residency=[
            types_pb2.ResidentEngine(engine_id=e.engine_id, model=e.model, tp_size=e.tp_size, gpu_uuids=e.gpu_uuids)
            for e in node.residency.engines
        ],
        layout=[group_proto(g, pools[g.pool].pool.uid if g.pool in pools else "") for g in node.layout.groups],
    )
    for name, a in sorted(pools.items()):
        if a.pool.model in used:
            tiers = [tier_proto(t, a.pool.default_tier) for t in a.pool.tiers]
            pool = types_pb2.PoolRef(name=name, uid=a.pool.uid)
            result.pools.append(agent_pb2.PoolDirective(pool=pool, model=a.model.to_proto(), tiers=tiers))
    result.deadline.FromNanoseconds(int((now + DEADLINE_S) * 1e9))
    return result


def named(message: str, models: Mapping[str, str]) -> list[str]:
    """Pools whose model a rejection is about, of those in its directive; all of them where it names none. `models`: by pool."""
    found = [m for m in models.values() if re.search(rf"(?<![\w.:/-]){re.escape(m)}(?![\w/-])", message)]
    return [n for n, m in models.items() if m in found or not found]


def concerned(agent: Agent, node: NodePlan) -> set[str]:
    """Pools that have a group on a node, or shall have one."""
    return {g.pool for g in node.layout.groups} | {r.group.pool.name for r in agent.report.groups}


@dataclass
class Sent:
    """The last directive to one agent and what became of it. Times: monotonic seconds."""

    digest: str
    directive: agent_pb2.NodeDirective
    layout: Layout
    at: float
    rejected: REJECTED | None = None


@dataclass
class Executor:
    sent: dict[str, Sent] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    """When it began to lead."""
    stale_term: int = 0
    """Highest term that an agent answered STALE_TERM with."""
    illegal: dict[tuple[str, int], str] = field(default_factory=dict)
    """ILLEGAL_TP messages by (pool, generation)."""
    carried: frozenset[str] = frozenset()
    """Pools that exist without a spec in force. What runs of them stays, so their nodes get no directive: it could not name the model."""

    def leads(self) -> None:
        """A term begins, maybe hours after the process did."""
        self.began = time.monotonic()

    def keep(self, agents: Collection[str], pools: Collection[str]) -> None:
        """Forgets the others."""
        self.sent = {i: s for i, s in self.sent.items() if i in agents}
        self.illegal = {k: m for k, m in self.illegal.items() if k[0] in pools}

    def wanted(self, agent: Agent, node: NodePlan, pools: Mapping[str, Accepted]) -> bool:
        """Whether this node needs a directive now."""
        if not agent.connected or agent.in_progress or agent.report.draining:
            return False
        if any(r.group.pool.name in self.carried for r in agent.report.groups):
            return False
        last, mark = self.sent.get(agent.agent_id), digest(node, pools)
        applied = agent.report.applied_operation_id
        if applied.partition(".")[0] == mark:
            # A new leader has seen little of demand: what it would limit otherwise is no news yet.
            recent = time.monotonic() - max(last.at if last is not None else 0.0, self.began) < REFRESH_S
            return not recent and drifted(layout_of(agent.report), node.layout)
        if not applied and not node.residency.engines and last is None:
            return False
        return last is None or last.digest != mark or time.monotonic() - last.at > RETRY_S

    async def send(self, agents: Mapping[str, Agent], nodes: list[NodePlan], pools: Mapping[str, Accepted], term: int) -> None:
        """To all at once, except for the first: between it and the rest a crash must do no harm."""
        for part in (nodes[:1], nodes[1:]):
            await asyncio.gather(*(self._send(agents[n.agent_id], n, pools, term) for n in part))
            if part:
                maybe_die(FaultPoint.OPERATOR_HALF_SENT)

    async def _send(self, agent: Agent, node: NodePlan, pools: Mapping[str, Accepted], term: int) -> None:
        last = self.sent.get(agent.agent_id)
        generation = max(agent.report.applied_generation, agent.described.applied_generation, last.directive.generation if last else 0) + 1
        d = directive(node, pools, generation, term, time.time())
        log.info("directive %s to %s: %d groups, %d engines", d.operation_id, agent.agent_id, len(d.layout), len(d.residency))
        self.sent[agent.agent_id] = sent = Sent(digest(node, pools), d, node.layout, time.monotonic())
        try:
            apply: Callable[..., grpc.aio.UnaryUnaryCall[agent_pb2.ApplyRequest, agent_pb2.ApplyResponse]] = agent.link.stub.Apply
            answer = await apply(agent_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=d), timeout=CALL_S)
        except grpc.aio.AioRpcError as e:
            log.warning("%s did not take %s: %s %s", agent.agent_id, d.operation_id, e.code().name, e.details())
            return
        if answer.WhichOneof("answer") != "rejected":
            return
        sent.rejected = answer.rejected
        log.warning("%s rejected %s: %s", agent.agent_id, d.operation_id, answer.rejected.message)
        if answer.rejected.reason == REJECTED.REASON_STALE_TERM:
            self.stale_term = max(self.stale_term, answer.rejected.highest_term)
            sent.at = 0.0  # again at once, with a higher term
        elif answer.rejected.reason == REJECTED.REASON_ILLEGAL_TP:
            for n in named(answer.rejected.message, {p.pool.name: p.model.name for p in d.pools}):
                self.illegal[n, pools[n].generation] = answer.rejected.message
