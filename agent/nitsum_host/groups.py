"""Groups, as flips move them and as their engines end."""

from nitsum.layout import Group
from nitsum.ledger import Ledger
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host.node import Live, Node, State
from nitsum_host.places import link
from nitsum_host.streams import admit, finish, refuse_stream

Finish, Refused = node_pb2.Finish, node_pb2.Refused
CLOSED_REMEMBERED_MAX = 512


def make_known(node: Node, group: Group, wire: types_pb2.Group, epoch: int, state: "State.ValueType") -> Live:
    slot = node.slots.get(group.engine_id)
    wire = types_pb2.Group.FromString(wire.SerializeToString())
    wire.epoch = epoch
    ledger = Ledger(group.capacity, group.shares, slot.info.max_total_tokens if slot and slot.info else 0)
    node.groups[group.group_id] = live = Live(group, wire, state, ledger)
    node.closed.pop(group.group_id, None)
    return live


def close_groups(node: Node, successors: dict[str, tuple[str, ...]]) -> None:
    """Groups, each with those that take over; together, so that none starts what another gives up."""
    waiting: list[str] = []
    for group_id, after in successors.items():
        live = node.groups[group_id]
        live.state = State.GROUP_STATE_CLOSING
        _remember(node, group_id, after)
        waiting += [*(e.rid for e in live.ledger.empty_queues()), *live.waiting]
    link(node)
    for stream in [node.streams[rid] for rid in waiting if rid in node.streams]:
        refuse_stream(node, stream, Refused.REASON_MOVED, "the group is closing")


def _remember(node: Node, group_id: str, successors: tuple[str, ...]) -> None:
    node.closed.pop(group_id, None)
    node.closed[group_id] = successors
    while len(node.closed) > CLOSED_REMEMBERED_MAX:
        node.closed.pop(next(iter(node.closed)))


def abort_streams(node: Node, group_id: str) -> bool:
    """Aborts what runs on the group; False when nothing does."""
    live = node.groups[group_id]
    running = [s for s in node.streams.values() if s.group_id == group_id and s.on_engine]
    for stream in running:
        stream.moving = True
        node.slots[live.group.engine_id].engine.abort(stream.rid)
    return bool(running)


def end_streams(node: Node, group_id: str) -> None:
    """What has not ended by itself is over now; its late tokens are dropped."""
    node.groups[group_id].ledger.empty_queues()  # first: what ends must not make room for what ends next
    for stream in [s for s in node.streams.values() if s.group_id == group_id]:
        finish(node, stream, Finish(kind=Finish.KIND_MOVED, successors=node.successors(group_id)))


def open_groups(node: Node, *group_ids: str) -> None:
    """Together: what one of them gathered may need a place in another."""
    opened = [node.groups[group_id] for group_id in group_ids]
    for live in opened:
        live.state = State.GROUP_STATE_OPEN
        node.closed.pop(live.group.group_id, None)
    link(node)
    for live in opened:
        waiting, live.waiting = live.waiting, {}
        for stream in waiting.values():
            admit(node, live, stream)


def remove_group(node: Node, group_id: str, successors: tuple[str, ...]) -> None:
    live = node.groups[group_id]
    _remember(node, group_id, successors)
    live.ledger.empty_queues()
    for stream in [s for s in node.streams.values() if s.group_id == group_id]:
        finish(node, stream, Finish(kind=Finish.KIND_MOVED, successors=node.successors(group_id)))
    assert not live.waiting
    del node.groups[group_id]
    link(node)


def on_engine_ended(node: Node, engine_id: str, message: str) -> None:
    """Its streams are told; its group waits for the engine that comes back."""
    slot = node.slots.get(engine_id)
    if slot is not None:
        slot.state, slot.message = agent_pb2.EngineReport.STATE_FAILED, message[:500]
    hit = [g for g in node.groups.values() if g.group.engine_id == engine_id]
    for live in hit:
        live.ledger.clear()  # first: what ends below must not make room on a dead engine
        if live.state == State.GROUP_STATE_OPEN:
            live.state = State.GROUP_STATE_FAILED
    link(node)
    for live in hit:
        ours = [s for s in node.streams.values() if s.group_id == live.group.group_id and s.rid not in live.waiting]
        for stream in ours:
            crashed = stream.on_engine and not stream.moving
            kind = Finish.KIND_ENGINE_CRASHED if crashed else Finish.KIND_MOVED
            finish(node, stream, Finish(kind=kind, successors=node.successors(live.group.group_id)))
    node.touch()
