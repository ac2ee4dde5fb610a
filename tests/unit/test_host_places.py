"""Places in a group that decodes, promised to what another one prefills: how each of them ends. No gRPC, no SGLang."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nitsum import onward
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host import streams
from nitsum_host.testing.world import World, world

PREFILL, DECODE, MIXED = types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE, types_pb2.ROLE_MIXED
OPEN = types_pb2.GROUP_STATE_OPEN
Kind = node_pb2.Finish
LONG = 100_000
P, D = "g1-0", "g1-1"


class Session:
    """A gateway that does nothing by itself."""

    number = 7

    def __init__(self, w: World) -> None:
        self.w = w
        self.finishes: dict[str, node_pb2.Finish] = {}
        self.tokens: dict[str, list[int]] = {}
        self.on_token: Callable[[str], None] = lambda name: None

    def send(self, frame: node_pb2.AttachResponse) -> None:
        for delta in frame.tokens.deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.HasField("finish"):
                self.finishes[delta.request_id] = delta.finish
            elif delta.token_ids:
                self.on_token(delta.request_id)

    def submit(self, name: str, group_id: str = P, follows: str = "", tokens: int = LONG) -> None:
        got = self.tokens.get(follows, [])
        s = node_pb2.Submit(
            request_id=name, group_id=group_id, epoch=self.w.node.groups[group_id].wire.epoch, input_ids=[1, 2, *got], resume_k=len(got)
        )
        s.sampling.max_new_tokens, s.follows = tokens, follows
        streams.submit(self.w.node, self, s)


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        await directed(made)
        yield made


async def directed(w: World, prefill: int = PREFILL, decode: int = DECODE, places: int = 1) -> None:
    d = w.directive(1, roles=(prefill, decode))
    d.layout[1].capacity.max_running = places
    report = await w.carried_out(d)
    assert not report.problem, report.problem


def counts(w: World) -> tuple[int, int, int, int]:
    """(running, waiting where it prefills; running, promised where it decodes)."""
    p, d = w.node.groups[P].ledger, w.node.groups[D].ledger
    return len(p.running), p.queued_total, len(d.running), d.reserved


async def on_its_way(w: World) -> Session:
    """`a` has left and has not come; `b` waits for its place."""
    s = Session(w)
    s.submit("a")
    s.submit("b")
    assert counts(w) == (1, 1, 0, 1)
    await w.until(lambda: "a" in s.finishes)
    assert (s.finishes["a"].kind, [x.group_id for x in s.finishes["a"].successors]) == (Kind.KIND_MOVED, [D])
    assert counts(w) == (0, 1, 0, 1)
    return s


async def test_more_never_decode_than_may_and_the_rest_waits_before_its_prefill(w: World) -> None:
    await directed(w, places=2)
    for i in range(7):
        w.gateway.start(str(i), 60)
    assert counts(w) == (2, 5, 0, 2)
    most = 0
    while len(w.gateway.done) < 7:
        *_, running, promised = counts(w)
        most = max(most, running + promised)
        await asyncio.sleep(0)
    await w.gateway.all_done()
    assert most == 2
    assert set(w.gateway.hops.values()) == {2}
    assert counts(w) == (0, 0, 0, 0)


async def test_a_stream_takes_its_place_and_its_end_lets_the_next_one_prefill(w: World) -> None:
    s = await on_its_way(w)
    s.submit("a2", D, "a", tokens=len(s.tokens["a"]) + 20)
    assert counts(w) == (0, 1, 1, 0)
    await w.until(lambda: "b" in s.finishes)
    assert "a2" in s.finishes
    assert counts(w) == (0, 0, 0, 1), "b is on its way"


@pytest.mark.parametrize("where", [P, "gone"])
async def test_one_that_goes_elsewhere_gives_its_place_up(w: World, where: str) -> None:
    s = await on_its_way(w)
    if where == P:
        s.submit("a2", P, "a")
        assert counts(w) == (2, 0, 0, 1), "it stays, and b has the place"
    else:
        streams.submit(w.node, s, node_pb2.Submit(request_id="a2", group_id=where, input_ids=[1], follows="a"))
        assert counts(w) == (1, 0, 0, 1)


async def test_one_whose_client_goes_on_its_way_gives_its_place_up(w: World) -> None:
    s = await on_its_way(w)
    streams.abort(w.node, s, "a")
    assert counts(w) == (1, 0, 0, 1)


async def test_one_whose_client_goes_as_it_is_handed_over_goes_nowhere(w: World) -> None:
    s = Session(w)
    s.on_token = lambda name: streams.abort(w.node, s, name)
    s.submit("a")
    s.submit("b")
    await w.until(lambda: len(s.finishes) == 2)
    assert {f.kind for f in s.finishes.values()} == {Kind.KIND_ABORTED}
    assert counts(w) == (0, 0, 0, 0)


async def test_a_gateway_that_leaves_gives_up_places_of_its_own_alone(w: World) -> None:
    s = await on_its_way(w)
    other = Session(w)
    other.number = 8
    other.submit("a")
    streams.leave(w.node, other)
    assert counts(w) == (0, 1, 0, 1)
    streams.leave(w.node, s)
    await w.until(lambda: counts(w) == (0, 0, 0, 0))


async def test_one_that_does_not_come_gives_its_place_up_in_time(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    s = await on_its_way(w)
    streams.expire(w.node)
    assert counts(w) == (0, 1, 0, 1)
    monkeypatch.setattr(onward, "WAY_S", 0.0)
    streams.expire(w.node)
    assert counts(w) == (1, 0, 0, 1)
    s.submit("a2", D, "a")
    assert counts(w) == (1, 0, 1, 1), "one that comes late is let in all the same"


async def test_one_that_ends_where_it_prefills_gives_its_place_up(w: World) -> None:
    s = Session(w)
    s.submit("a", tokens=1)
    s.submit("b")
    await w.until(lambda: "a" in s.finishes)
    assert s.finishes["a"].kind == Kind.KIND_LENGTH
    await w.until(lambda: "b" in s.finishes)
    assert s.finishes["b"].kind == Kind.KIND_MOVED


async def test_when_the_engine_that_prefills_ends_its_places_do(w: World) -> None:
    s = Session(w)
    s.submit("a")
    s.submit("b")
    w.engine("e1-0").crash()
    await w.until(lambda: len(s.finishes) == 2)
    assert {i: f.kind for i, f in s.finishes.items()} == {"a": Kind.KIND_ENGINE_CRASHED, "b": Kind.KIND_MOVED}
    assert counts(w) == (0, 0, 0, 0)


async def test_when_the_engine_that_decodes_ends_streams_run_whole_until_it_is_back(w: World) -> None:
    s = await on_its_way(w)
    w.arrange("e1-1", lambda e: e.may_start.clear())
    w.engine("e1-1").crash()
    await w.until(lambda: counts(w) == (1, 0, 0, 0))
    await w.until(lambda: len(s.tokens.get("b", [])) > 20)
    s.submit("a2", D, "a")  # gathered there
    await w.until(lambda: len(w.made["e1-1"]) == 2)
    w.engine("e1-1").may_start.set()
    await w.until(lambda: counts(w)[2] == 1)
    await w.until(lambda: counts(w) == (1, 0, 1, 0))
    assert "b" not in s.finishes, "it has begun, so it stays"


@pytest.mark.parametrize(("prefill", "decode"), [(MIXED, DECODE), (PREFILL, MIXED)])
async def test_a_changed_role_gives_places_up_and_nobody_waits_for_them(w: World, prefill: int, decode: int) -> None:
    s = await on_its_way(w)
    await directed(w, prefill, decode)
    assert counts(w) == (1, 0, 0, int(decode == DECODE)), "a is still on its way to what decodes"
    await w.until(lambda: len(s.tokens.get("b", [])) > 20)
    streams.abort(w.node, s, "a")
    await directed(w)
    s.submit("c")
    await w.until(lambda: "c" in s.finishes)
    assert [x.group_id for x in s.finishes["c"].successors] == [D]
    assert "b" not in s.finishes, "it has begun, so it stays"


async def test_a_flip_ends_all_places_and_its_way_back_promises_before_it_lets_in(w: World) -> None:
    s = await on_its_way(w)
    await w.carried_out(w.directive(2))
    assert not any(o.on_way for o in w.node.onward.values())
    assert s.finishes.keys() == {"a"}
    for engine_id in ("e1-0", "e1-1"):
        w.engine(engine_id).wakes = False
    d = w.directive(1, roles=(PREFILL, DECODE))
    d.layout[1].capacity.max_running = 1
    await w.apply(d)
    await w.until(lambda: P in w.node.groups)
    for name in "cde":
        s.submit(name)  # gathered
    for engine_id in ("e1-0", "e1-1"):
        w.engine(engine_id).wakes = True
    await w.until(lambda: w.node.groups[P].state == OPEN)
    assert counts(w)[1:] == (2, 0, 1), "one is let in, for the one place; it may have left already"


async def test_a_node_that_drains_runs_what_waits(w: World) -> None:
    from nitsum_api.host.v1 import host_pb2

    s = await on_its_way(w)
    draining = asyncio.create_task(w.host.Drain(host_pb2.DrainRequest(grace_ms=10_000), None))  # type: ignore[arg-type]
    await w.until(lambda: len(s.tokens.get("b", [])) > 20)
    assert (counts(w), s.finishes.keys()) == ((1, 0, 0, 0), {"a"})
    streams.abort(w.node, s, "b")
    await draining


async def test_hand_overs_and_flips_at_once_lose_no_token_and_no_place(w: World) -> None:
    for turn in range(4):
        await directed(w, places=2)
        for i in range(8):
            w.gateway.start(f"{turn}-{i}", 40)
        await w.carried_out(w.directive(2))
    await directed(w, places=2)
    await w.gateway.all_done()
    assert counts(w) == (0, 0, 0, 0)
