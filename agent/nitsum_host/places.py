"""Streams start where there is room, and go on where a place is promised to them: from a group that prefills to one that decodes."""

import time

from nitsum.layout import Role
from nitsum.onward import Name, Onward
from nitsum_api.node.v1 import node_pb2
from nitsum_host.node import Live, Node, State, Stream
from nitsum_sglang.port import EngineRequest


def start(node: Node, live: Live, stream: Stream) -> None:
    stream.on_engine = True
    node.slots[live.group.engine_id].engine.submit(EngineRequest(stream.rid, stream.submit))


def start_queued(node: Node, live: Live) -> None:
    """What the group's own ledger lets in by now."""
    for entry in live.ledger.start():
        if entry.rid in node.streams:
            start(node, live, node.streams[entry.rid])


def link(node: Node) -> None:
    """Groups that prefill look at those that decode, as they are now; after each change of what is open, or in which role."""
    opened = [live for live in node.groups.values() if live.state == State.GROUP_STATE_OPEN]
    pools = {live.group.pool for live in node.groups.values()}
    for pool in sorted(pools | node.onward.keys()):
        ours = [live for live in opened if live.group.pool == pool and not node.draining]
        prefill, decode = (tuple(live.ledger for live in ours if live.group.role is role) for role in (Role.PREFILL, Role.DECODE))
        node.onward.setdefault(pool, Onward()).link(prefill, decode)
    for pool in node.onward.keys() - pools:
        del node.onward[pool]
    refill(node)
    for live in opened:
        start_queued(node, live)


def hand_over(node: Node, stream: Stream) -> None:
    """To the group where a place is promised to it, once its first token is there, for then the KV of its prompt is in the node's
    store. Once at most: what comes back, since no other group took it, has no place and stays. So does what has begun before there was
    one: the KV of what it made would be computed again in the steps of those that decode."""
    live = node.groups[stream.group_id]
    onward = node.onward[live.group.pool]
    if stream.moving or onward.place(stream.rid) is None:
        return
    if stream.begun:
        onward.release(stream.rid)
        refill(node)
    else:
        stream.moving = True
        node.slots[live.group.engine_id].engine.abort(stream.rid)


def departs(node: Node, stream: Stream) -> list[node_pb2.Successor]:
    """To the group that keeps a place for it, if one does: a flip may have come between."""
    name = stream.session.number, stream.submit.request_id
    taker = node.onward[node.groups[stream.group_id].group.pool].depart(stream.rid, name, time.monotonic())
    found = [live for live in node.groups.values() if live.ledger is taker]
    return [node_pb2.Successor(group_id=live.group.group_id, epoch=live.wire.epoch) for live in found]


def arrived(node: Node, name: Name) -> bool:
    return any([onward.arrived(name) for onward in node.onward.values()])


def refill(node: Node) -> None:
    """Starts what has waited for a place that may be free now."""
    for entry in [e for onward in node.onward.values() for e in onward.start()]:
        if entry.rid in node.streams:
            stream = node.streams[entry.rid]
            start(node, node.groups[stream.group_id], stream)
