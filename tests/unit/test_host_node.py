"""What the node does with streams when engines end and groups move: no gRPC, no flips."""

import asyncio
from pathlib import Path

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host import streams
from nitsum_host.testing.world import World, world
from nitsum_sglang.port import Timings

Finish, Refused = node_pb2.Finish, node_pb2.Refused


class Session:
    number = 7

    def __init__(self) -> None:
        self.finishes: dict[str, int] = {}
        self.refused: dict[str, int] = {}

    def send(self, frame: node_pb2.AttachResponse) -> None:
        self.finishes |= {d.request_id: d.finish.kind for d in frame.tokens.deltas if d.finish.kind}
        if frame.HasField("refused"):
            self.refused[frame.refused.request_id] = frame.refused.reason


def submit(w: World, session: Session, name: str, tokens: int = 10, prompt: int = 2, **fields: object) -> None:
    live = w.node.groups["g1-0"]
    s = node_pb2.Submit(request_id=name, group_id="g1-0", epoch=live.wire.epoch, input_ids=[1] * prompt, **fields)  # type: ignore[arg-type]
    s.sampling.max_new_tokens = tokens
    streams.submit(w.node, session, s)


async def test_what_waited_for_its_turn_did_not_see_the_crash(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        session = Session()
        for name in "abc":
            submit(w, session, name, 900, prompt=7000)  # the first alone fills the KV capacity
        w.engine("e1-0").crash()
        await w.until(lambda: len(session.finishes) == 3)
        assert session.finishes == {"a": Finish.KIND_ENGINE_CRASHED, "b": Finish.KIND_MOVED, "c": Finish.KIND_MOVED}


async def test_nobody_waits_for_ever_at_a_group_without_an_engine(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        session = Session()
        w.arrange("e1-0", lambda e: e.may_start.clear())
        w.engine("e1-0").crash()
        await w.until(lambda: w.node.groups["g1-0"].state == types_pb2.GROUP_STATE_FAILED)
        submit(w, session, "patient", 3)
        submit(w, session, "late", 3, queue_ms=20)
        streams.expire(w.node)
        assert not session.refused
        await asyncio.sleep(0.03)
        streams.expire(w.node)
        assert session.refused == {"late": Refused.REASON_QUEUE_TIMEOUT}
        await w.until(lambda: len(w.made["e1-0"]) == 2)
        w.engine("e1-0").may_start.set()
        await w.until(lambda: session.finishes == {"patient": Finish.KIND_LENGTH})


async def test_a_gateway_that_leaves_takes_what_waits_with_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        session = Session()
        for name in "abc":
            submit(w, session, name, 100_000)
        streams.leave(w.node, session)
        await w.until(lambda: not w.node.streams)
        assert not w.node.groups["g1-0"].ledger.running


async def test_reports_carry_what_the_steps_of_open_groups_take(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        step = agent_pb2.StepTiming(phase="decode", batch=3, context=100, mean_ms=7.5, count=20)
        w.engine("e1-0").timings = Timings(4, (step,))
        live = w.node.groups["g1-0"]
        report = w.node.report(live)
        assert (list(report.steps), report.steps_serial, report.group.group_id) == ([step], 4, "g1-0")
        live.state = types_pb2.GROUP_STATE_CLOSING
        assert not w.node.report(live).steps, "it is ending: what it takes tells nothing"
        live.state = types_pb2.GROUP_STATE_OPEN
