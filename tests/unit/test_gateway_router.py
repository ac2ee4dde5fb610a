"""The router between a front that speaks SGLang's structs and nodes that do as they like: what it keeps, what it forgets."""

import asyncio
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nitsum_gateway.nodes
from nitsum.layout import Role
from nitsum.routing import GroupView
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_gateway.emit import Row
from nitsum_gateway.nodes import NodeLine
from nitsum_gateway.router import Router

Kind = node_pb2.Finish
Refused = node_pb2.Refused
PARAMS = {
    "max_new_tokens": 1000, "temperature": 1.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "repetition_penalty": 1.0, "min_new_tokens": 0, "stop_strs": [], "stop_regex_strs": [], "stop_token_ids": None, "ignore_eos": False,
    "no_stop_trim": False, "skip_special_tokens": True, "spaces_between_special_tokens": True, "logit_bias": None, "sampling_seed": None,
    "json_schema": None, "regex": None, "ebnf": None, "structural_tag": None, "custom_params": {"nitsum_tier": "fast"},
}  # fmt: skip


class Line:
    """A node's line that takes everything and says nothing by itself."""

    def __init__(self, agent_id: str, up: bool = True) -> None:
        self.agent_id, self.up, self.problem, self.gone = agent_id, up, "", False
        self.frames: list[node_pb2.AttachRequest] = []

    @property
    def changes(self) -> int:
        return int(self.up)

    def groups(self) -> list[GroupView]:
        return [GroupView((self.agent_id, "g"), 1, True, frozenset())] if self.up else []

    def send(self, frame: node_pb2.AttachRequest) -> bool:
        if self.up:
            self.frames.append(frame)
        return self.up

    def learn(self, successors: list[node_pb2.Successor]) -> None:
        pass

    def submits(self) -> list[node_pb2.Submit]:
        return [f.submit for f in self.frames if f.HasField("submit")]


class Front:
    """Stands for SGLang's detokenizer: keeps what each request got."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.ends: dict[str, dict[str, Any]] = {}

    def emit(self, rows: list[Row]) -> None:
        for row in rows:
            assert row.request.rid not in self.ends, "something after the end"
            self.ids.setdefault(row.request.rid, []).extend(row.ids)
            assert row.output_tokens == len(self.ids[row.request.rid])
            if row.finish is not None:
                self.ends[row.request.rid] = row.finish


class Sized(Line):
    """Of a group that runs 20 within SLO and says how many it runs when it is asked."""

    runs, epoch, news = 0, 1, 0

    @property
    def changes(self) -> int:
        return self.news

    def groups(self) -> list[GroupView]:
        return [GroupView((self.agent_id, "g"), self.epoch, True, frozenset(), self.runs, capacity=20)]

    def says(self, runs: int, epoch: int = 1) -> None:
        self.runs, self.epoch, self.news = runs, epoch, self.news + 1


def request(rid: str, ids: list[int] | None = None, salt: str | None = None) -> Any:
    return SimpleNamespace(
        rid=rid,
        input_ids=array("q", ids or [1, 2, 3]),
        sampling_params=SimpleNamespace(**PARAMS),
        return_logprob=False,
        require_reasoning=False,
        cache_salt=salt,
    )


def router(*lines: Line) -> tuple[Router, Front]:
    front = Front()
    r = Router(front, 2048)  # type: ignore[arg-type]
    r.lines = {line.agent_id: line for line in lines}
    r.tiers = [types_pb2.Tier(name="fast", ttft_ms=1000, is_default=True)]
    return r, front


def tokens(rid: str, ids: list[int], kind: "Kind.Kind.ValueType" = Kind.KIND_UNSPECIFIED) -> node_pb2.AttachResponse:
    delta = node_pb2.TokenDelta(request_id=rid, token_ids=ids)
    if kind:
        delta.finish.kind = kind
    return node_pb2.AttachResponse(tokens=node_pb2.TokenBatch(deltas=[delta]))


def refused(rid: str, reason: "Refused.Reason.ValueType") -> node_pb2.AttachResponse:
    return node_pb2.AttachResponse(refused=Refused(request_id=rid, reason=reason, retry_after_ms=5))


def inside(work: Callable[[], None]) -> None:
    async def run() -> None:
        work()

    asyncio.run(run())


WHAT = ["tokens", "tokens", "stop", "moved", "crashed", "error", "aborted", "full", "gone", "invalid", "break", "leave", "late"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 3), st.integers(0, 1)), max_size=40))
def test_whatever_nodes_say_nothing_is_kept_of_requests_that_ended(story: list[tuple[str, int, int]]) -> None:
    """And each ends once, with tokens in the order of their submissions."""

    def work() -> None:
        lines = [Line("a"), Line("b")]
        r, front = router(*lines)
        for i in range(4):
            r.submit(request(f"r{i}"))
        old: list[str] = []
        for what, i, j in story:
            live = r.live.get(f"r{i}")
            if what == "break":
                r.on_break(lines[j])
            elif what == "leave":
                r.abort(f"r{i}")
            elif what == "late":
                for rid in old[-3:]:
                    r.on_frame(lines[j], tokens(rid, [666], Kind.KIND_STOP))
            elif live is not None and live.stream.group is not None:
                rid, line = live.node_rid(live.stream.hop), r.lines[live.stream.group[0]]
                old.append(rid)
                number = [len(live.out)]
                match what:
                    case "tokens":
                        r.on_frame(line, tokens(rid, number))
                        old.pop()
                    case "stop":
                        r.on_frame(line, tokens(rid, number, Kind.KIND_STOP))
                    case "moved" | "crashed" | "error" | "aborted":
                        kinds = {"moved": Kind.KIND_MOVED, "crashed": Kind.KIND_ENGINE_CRASHED, "error": Kind.KIND_ERROR}
                        r.on_frame(line, tokens(rid, [], kinds.get(what, Kind.KIND_ABORTED)))
                    case _:
                        reasons = {"full": Refused.REASON_FULL, "gone": Refused.REASON_UNKNOWN_GROUP, "invalid": Refused.REASON_INVALID}
                        r.on_frame(line, refused(rid, reasons[what]))
            assert len(r.by_hop) <= len(r.live)
            assert set(front.ends) | set(r.live) == {f"r{i}" for i in range(4)}
        for rid, ids in front.ids.items():
            assert ids == list(range(len(ids))), rid
        for i in range(4):
            r.abort(f"r{i}")
        assert not r.live
        assert not r.by_hop
        assert set(front.ends) == {f"r{i}" for i in range(4)}
        assert r.demand.in_flight["fast"] == 0

    inside(work)


def test_a_line_that_was_replaced_takes_no_stream_of_its_successor_along() -> None:
    def work() -> None:
        old, new = Line("a"), Line("a")
        r, front = router(old)
        r.submit(request("before"))
        r.lines["a"] = new
        r.submit(request("after"))
        assert [len(line.submits()) for line in (old, new)] == [1, 1]
        r.on_break(old)
        assert r.live["before"].stream.group is None  # looks for another group
        assert r.live["after"].stream.group == ("a", "g")
        assert r.live["after"].stream.moves == 0
        assert not front.ends

    inside(work)


def test_a_submission_names_the_one_before_it_wherever_that_was() -> None:
    """By that a node knows which place it kept."""

    def work() -> None:
        a, b = Line("a"), Line("b")
        r, _ = router(a, b)
        r.submit(request("r"))
        first = a.submits()[0].request_id
        r.on_frame(a, tokens(first, [4], Kind.KIND_MOVED))
        second = b.submits()[0]
        r.on_frame(b, tokens(second.request_id, [5], Kind.KIND_MOVED))
        assert [s.follows for line in (a, b) for s in line.submits()] == ["", second.request_id, first]

    inside(work)


def test_too_long_for_an_engine_is_told_apart_from_invalid() -> None:
    def work() -> None:
        line = Line("a")
        r, front = router(line)
        for rid in ("long", "bad"):
            r.submit(request(rid))
        r.on_frame(line, refused("1.1.", Refused.REASON_TOO_LONG))
        r.on_frame(line, refused("2.1.", Refused.REASON_INVALID))
        assert [front.ends[rid]["status_code"] for rid in ("long", "bad")] == [400, 400]
        assert [front.ends[rid]["message"].endswith(" [context length]") for rid in ("long", "bad")] == [True, False]

    inside(work)


def test_tokens_that_come_with_an_end_that_is_none_do_not_end_the_stream() -> None:
    """Engines send none with it, but what they were must not look like all that there is."""

    def work() -> None:
        line = Line("a")
        r, front = router(line)
        for rid in ("moved", "broken"):
            r.submit(request(rid))
        r.on_frame(line, tokens("1.1.", [7, 8], Kind.KIND_MOVED))
        r.on_frame(line, tokens("2.1.", [7], Kind.KIND_ERROR))
        assert (front.ids["moved"], "moved" in front.ends, r.live["moved"].out) == ([7, 8], False, [7, 8])
        assert (front.ids["broken"], front.ends["broken"]["status_code"]) == ([7], 500)

    inside(work)


def test_nobody_waits_for_nodes_that_are_gone() -> None:
    def work() -> None:
        a, b = Line("a", up=False), Line("b", up=False)
        r, front = router(a, b)
        r.submit(request("early"))
        assert "early" not in front.ends, "a line that has just broken may be back in a second"
        a.gone = True
        r.submit(request("half"))
        assert "half" not in front.ends
        b.gone = True
        r.submit(request("late"))
        assert front.ends["late"]["status_code"] == 503
        assert {"early", "half"} <= set(r.live), "what has begun to wait waits"

    inside(work)


def test_routes_follow_what_lines_say() -> None:
    """Kept between requests: a line that breaks, comes back, is replaced or is no longer named shows at once."""

    def work() -> None:
        a, b = Line("a"), Line("b")
        r, _ = router(a, b)
        seen = [sorted(g.key[0] for g in r.view())]
        a.up = False
        seen.append(sorted(g.key[0] for g in r.view()))
        a.up = True
        seen.append(sorted(g.key[0] for g in r.view()))
        del r.lines["b"]
        seen.append(sorted(g.key[0] for g in r.view()))
        r.lines["b"] = Line("b")
        seen.append(sorted(g.key[0] for g in r.view()))
        assert seen == [["a", "b"], ["b"], ["a", "b"], ["a"], ["a", "b"]]
        for i in range(4):
            r.submit(request(f"r{i}"))
        assert [len(line.submits()) for line in (a, r.lines["b"])] == [2, 2], "what was sent counts before the node says so"

    inside(work)


def test_the_next_turn_goes_where_the_last_one_ran_if_that_costs_little() -> None:
    def work() -> None:
        a, b = Sized("a"), Sized("b")
        r, _ = router(a, b)
        talk, number = list(range(2000)), 0

        def sent(ids: list[int], a_runs: int, b_runs: int, salt: str | None = None, epoch: int = 1) -> str:
            nonlocal number
            number += 1
            a.says(a_runs, epoch)
            b.says(b_runs)
            before = len(a.submits())
            r.submit(request(f"r{number}", ids, salt))
            return "a" if len(a.submits()) > before else "b"

        assert sent(talk, 0, 1) == "a"
        assert sent([*talk, *range(500)], 4, 1) == "a", "less than a quarter of 20 fuller, and most of the prompt is there"
        assert sent([*talk, *range(500)], 4, 1, "acme") == "b", "nothing is shared with another salt"
        assert sent(talk[1:], 4, 1) == "b"
        assert sent(talk, 4, 1, epoch=2) == "b", "its engine is another: what the node's store has is worth half"
        assert sent(talk, 4, 1, epoch=2) == "b", "now it ran there"
        assert sent(talk, 1, 4, epoch=2) == "b"
        assert sent(talk, 1, 20, epoch=2) == "a", "full"
        del r.lines["b"]
        assert sent(talk, 19, 0, epoch=2) == "a", "gone"
        assert [len(s.input_ids) for s in a.submits()][:2] == [2000, 2500]

    inside(work)


def test_what_moved_is_looked_for_where_it_went() -> None:
    def work() -> None:
        a, b = Sized("a"), Sized("b")
        r, _ = router(a, b)
        talk = list(range(1000))
        r.submit(request("first", talk))
        r.on_frame(a, refused("1.1.", Refused.REASON_UNKNOWN_GROUP))
        assert r.live["first"].stream.group == ("b", "g")
        a.says(0)
        b.says(1)
        r.submit(request("second", talk))
        assert r.live["second"].stream.group == ("b", "g")

    inside(work)


def test_a_hand_over_leaves_prompts_with_the_group_that_prefills() -> None:
    class Two(Line):
        def groups(self) -> list[GroupView]:
            roles = (("p1", Role.PREFILL), ("p2", Role.PREFILL), ("d", Role.DECODE))
            return [GroupView((self.agent_id, g), 1, True, frozenset(), capacity=20, role=role) for g, role in roles]

    def work() -> None:
        line = Two("a")
        r, _ = router(line)
        talk = list(range(1000))
        r.submit(request("first", talk))
        r.on_frame(line, tokens("1.1.", [7], Kind.KIND_MOVED))
        assert r.live["first"].stream.group == ("a", "d")
        r.submit(request("second", talk))
        assert r.live["second"].stream.group == ("a", "p1")

    inside(work)


async def test_a_line_tells_roles_and_counts_its_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        types_pb2.Group(group_id=f"g{role}", pool=types_pb2.PoolRef(name="p"), role=role)
        for role in (types_pb2.ROLE_UNSPECIFIED, types_pb2.ROLE_MIXED, types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE)
    ]
    route = gateway_pb2.NodeRoute(agent_id="a", address="127.0.0.1:1", groups=groups)
    line = NodeLine(route, node_pb2.Hello(pool=types_pb2.PoolRef(name="p")), tmp_path, lambda line, frame: None, lambda line: None)
    line.outbox = asyncio.Queue()
    assert [g.role for g in line.groups()] == [Role.MIXED, Role.MIXED, Role.PREFILL, Role.DECODE]
    for change in (lambda: line.learn([]), lambda: line.apply(route), line._down):
        before = line.changes
        change()
        assert line.changes > before
    assert not line.gone
    monkeypatch.setattr(nitsum_gateway.nodes, "DOWN_S", 0.0)
    assert line.gone
    line.outbox = asyncio.Queue()
    assert not line.gone
    await line.close()
