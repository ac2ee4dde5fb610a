"""Directives as core types, checked: what comes in is either whole and legal, or answered with a typed rejection."""

from nitsum.layout import Capacity, Group, Layout, Role, TierShare
from nitsum.residency import Residency, ResidentEngine
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2

Reason = agent_pb2.ApplyResponse.Rejected.Reason
ROLES = {
    types_pb2.ROLE_UNSPECIFIED: Role.MIXED,
    types_pb2.ROLE_MIXED: Role.MIXED,
    types_pb2.ROLE_PREFILL: Role.PREFILL,
    types_pb2.ROLE_DECODE: Role.DECODE,
}


class Illegal(Exception):
    """Becomes ApplyResponse.Rejected."""

    def __init__(self, reason: "Reason.ValueType", message: str) -> None:
        super().__init__(message)
        self.reason = reason


def group(g: types_pb2.Group) -> Group:
    shares = tuple(TierShare(s.tier, s.share, s.max_running) for s in g.shares)
    c = g.capacity
    capacity = Capacity(c.max_running, c.max_kv_tokens, c.prefill_tokens_per_s, c.max_queued, c.prefill_tokens_per_step)
    return Group(g.group_id, g.engine_id, g.pool.name, g.model, g.tp_size, tuple(g.gpu_uuids), ROLES[g.role], shares, capacity)


def residency_and_layout(d: agent_pb2.NodeDirective, gpu_uuids: frozenset[str]) -> tuple[Residency, Layout]:
    """Raises Illegal with the field in its message."""
    try:
        residency = Residency(tuple(ResidentEngine(e.engine_id, e.model, e.tp_size, tuple(e.gpu_uuids)) for e in d.residency))
        layout = Layout(tuple(group(g) for g in d.layout))
    except (AssertionError, KeyError) as error:
        raise Illegal(Reason.REASON_INVALID, f"directive: {error}") from error
    used = [e.gpu_uuids for e in residency.engines] + [g.gpu_uuids for g in layout.groups]
    for uuids in used:
        if unknown := set(uuids) - gpu_uuids:
            raise Illegal(Reason.REASON_UNKNOWN_GPU, f"GPUs {sorted(unknown)} are not on this node; it has {sorted(gpu_uuids)}")
    models = {p.model.name for p in d.pools}
    for i, e in enumerate(residency.engines):
        if e.model not in models:
            raise Illegal(Reason.REASON_INVALID, f"residency[{i}].model: {e.model!r} is of no pool in the directive")
    for i, g in enumerate(layout.groups):
        engine = residency.engine(g.engine_id)
        if engine is None or (engine.model, engine.tp_size, engine.gpu_uuids) != (g.model, g.tp_size, g.gpu_uuids):
            raise Illegal(
                Reason.REASON_NOT_RESIDENT, f"layout[{i}]: engine {g.engine_id!r} is not in the residency with this model, TP and GPUs"
            )
    return residency, layout
