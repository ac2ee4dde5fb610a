"""ServingNode objects: what `kubectl get servingnodes` shows of each agent."""

from collections.abc import Mapping
from typing import Any

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import NodeCondition, Reason
from nitsum_api.resources import API_VERSION, NODE_KIND, EngineStatus, GpuStatus, GroupStatus, NodeStatus
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.observe import Agent, group_from
from nitsum_operator.standing import condition
from nitsum_operator.status import describe

STATES: dict[int, Any] = {1: "Starting", 2: "Open", 3: "Closing", 4: "Opening", 5: "Failed"}
ENGINES: dict[int, Any] = {1: "Starting", 2: "Warming", 3: "Parked", 4: "Awake", 5: "Failed"}
ROLES: dict[int, Any] = {1: "Mixed", 2: "Prefill", 3: "Decode"}


PARTS_MAX = 64
"""GPUs, groups, engines shown, as the schema bounds them."""


def node_object(agent: Agent) -> dict[str, Any]:
    d = agent.described
    spec = {"agentId": agent.agent_id, "nodeName": d.node_name, "nodeGroup": d.node_group}
    return {
        "apiVersion": API_VERSION,
        "kind": NODE_KIND,
        "metadata": {"name": agent.agent_id},
        "spec": {k: v for k, v in spec.items() if v},
    }


def node_status(agent: Agent, before: Mapping[str, Any], now: str) -> NodeStatus:
    d, r = agent.described, agent.report
    old = {c["type"]: c for c in before.get("conditions") or []}
    opened = [g.group for g in r.groups if g.state == types_pb2.GROUP_STATE_OPEN]
    index = {g.uuid: g.index for g in d.gpus}
    connected = ("True", Reason.ALL_CONNECTED, "Reports arrive.")
    if not agent.connected:
        connected = ("False", agent.trouble, agent.problem or "no report")
    elif not r.host_connected:
        connected = ("False", Reason.HOST_UNAVAILABLE, r.problem or "the engine host does not answer its agent")
    serving = (
        ("True", Reason.SERVING, f"{len(opened)} groups serve.")
        if opened and agent.connected
        else ("False", Reason.IDLE, "No group serves.")
    )
    if r.groups and not opened:
        serving = ("False", Reason.AWAITING_ENGINES, "Engines are being started.")
    elif not opened and agent.leaving:
        serving = ("False", Reason.DRAINING, "Its Node is tainted nitsum.io/drain: nothing is placed here.")
    elif agent.cordoned and not agent.leaving:
        serving = (*serving[:2], f"{serving[2]} Its Node is cordoned: nothing is added or changed.")
    rows = {NodeCondition.CONNECTED: connected, NodeCondition.SERVING: serving}
    return NodeStatus(
        address=agent.node_address,
        contract_version=d.contract_version,
        engine_build=d.engine_build[:256],
        epoch=r.epoch,
        highest_term=max(r.highest_term, d.highest_term),
        applied_generation=r.applied_generation,
        applied_operation_id=r.applied_operation_id,
        problem=r.problem[:1024],
        draining=r.draining or agent.leaving,
        layout=describe(map(group_from, opened)),
        gpu_count=len(d.gpus),
        gpus=[GpuStatus(uuid=g.uuid, index=g.index, type=g.type, memory_bytes=g.memory_bytes, island=g.island) for g in d.gpus[:PARTS_MAX]],
        groups=[_group(g, index) for g in r.groups[:PARTS_MAX]],
        engines=[_engine(e) for e in r.engines[:PARTS_MAX]],
        conditions=[condition(k, *row, old, now, 1) for k, row in rows.items()],
    )


def _group(g: agent_pb2.GroupReport, index: Mapping[str, int]) -> GroupStatus:
    return GroupStatus(
        id=g.group.group_id,
        pool=g.group.pool.name,
        tp=g.group.tp_size,
        role=ROLES.get(g.group.role),
        state=STATES.get(g.state),
        gpus=[index[u] for u in g.group.gpu_uuids if u in index],
        tiers=[s.tier for s in g.group.shares][:16],
    )


def _engine(e: agent_pb2.EngineReport) -> EngineStatus:
    return EngineStatus(
        id=e.engine.engine_id,
        model=e.engine.model,
        tp=e.engine.tp_size,
        state=ENGINES.get(e.state),
        restarts=e.restarts,
        message=e.message[:512],
    )
