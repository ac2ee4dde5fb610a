"""What a new leader knows of the time before it, read from what the last one wrote: specs in force, nodes that are lost. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nitsum.errors import InvalidSpec
from nitsum.perf.profile import Profile
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import Reason
from nitsum_api.resources import NodeSpec, NodeStatus, pool_from_resource
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Accepted, profile_for
from nitsum_operator.observe import Agent

STATES: dict[str, Any] = {
    "Starting": types_pb2.GROUP_STATE_STARTING,
    "Open": types_pb2.GROUP_STATE_OPEN,
    "Closing": types_pb2.GROUP_STATE_CLOSING,
    "Opening": types_pb2.GROUP_STATE_OPENING,
    "Failed": types_pb2.GROUP_STATE_FAILED,
}


def spec_in_force(obj: Mapping[str, Any], gpu_types: tuple[str, ...], profiles: Mapping[str, Profile]) -> Accepted | None:
    """Of a pool whose newest spec may be wrong: what an earlier leader acted on, as its status says. None where it says nothing usable."""
    kept = (obj.get("status") or {}).get("accepted") or {}
    try:
        spec = json.loads(kept.get("spec") or "")
        pool, model = pool_from_resource({**obj, "spec": spec})
        return Accepted(pool, model, profile_for(pool, gpu_types, profiles), int(kept["generation"]))
    except (ValueError, KeyError, InvalidSpec):  # of another version of this operator, or its profile is gone
        return None


def lost_agent(obj: Mapping[str, Any]) -> Agent | None:
    """From a ServingNode, for an agent that nobody has heard of since: the groups that its GPUs may still hold."""
    try:
        spec, status = NodeSpec.model_validate(obj.get("spec") or {}), NodeStatus.model_validate(obj.get("status") or {})
    except ValidationError:
        return None
    by_index = {g.index: g.uuid for g in status.gpus or []}
    gpus = [
        agent_pb2.Gpu(uuid=g.uuid, index=g.index or 0, type=g.type or "", memory_bytes=g.memory_bytes or 0, island=g.island or 0)
        for g in status.gpus or []
    ]
    described = agent_pb2.DescribeResponse(
        contract_version=status.contract_version or "",
        agent_id=spec.agent_id or "",
        node_name=spec.node_name or "",
        node_group=spec.node_group or "",
        gpus=gpus,
        highest_term=status.highest_term or 0,
        applied_generation=status.applied_generation or 0,
    )
    report = agent_pb2.NodeReport(agent_id=described.agent_id, highest_term=described.highest_term, epoch=status.epoch or 0)
    for g in status.groups or []:
        uuids = [by_index[i] for i in g.gpus or [] if i in by_index]
        group = types_pb2.Group(
            group_id=g.id, engine_id=g.id, pool=types_pb2.PoolRef(name=g.pool or ""), tp_size=g.tp or 0, gpu_uuids=uuids
        )
        report.groups.add(group=group, state=STATES.get(g.state or "", types_pb2.GROUP_STATE_FAILED))
    problem = "not heard of since this operator leads"
    return Agent(described.agent_id, described, report, {}, False, status.address or "", None, problem, Reason.AGENT_LOST)
