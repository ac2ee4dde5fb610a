"""The engine host's own bounds: what a gateway should have refused ends as that request's error, and nothing is sent to a scheduler."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_api import limits
from nitsum_api.node.v1 import node_pb2
from nitsum_gateway import bounds
from nitsum_sglang import seam
from nitsum_sglang.requests import Requests


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


BAD: list[tuple[str, Callable[[Any], Any]]] = [
    *((name, lambda s, n=name, v=value: setattr(s, n, v)) for name in limits.NUMBERS for value in (math.nan, math.inf, -math.inf, 1e308)),
    ("top_p", lambda s: setattr(s, "top_p", 1e-300)),
    ("logit_bias", lambda s: s.logit_bias.update({"1": math.nan})),
    ("logit_bias", lambda s: s.logit_bias.update({"1": -math.inf})),
    ("logit_bias", lambda s: s.logit_bias.update({"1": 1e30})),
    ("logit_bias", lambda s: s.logit_bias.update({str(i): 1.0 for i in range(1025)})),
    ("stop_token_ids", lambda s: s.stop_token_ids.extend([1] * 1089)),
    ("stop", lambda s: s.stop.extend(["x"] * 97)),
    ("stop", lambda s: s.stop_regex.append("x" * 1025)),
    ("regex", lambda s: setattr(s, "regex", "a|" * 1025)),
    ("regex", lambda s: setattr(s, "regex", "(" * 257)),
    ("ebnf", lambda s: setattr(s, "ebnf", "x" * 8193)),
    ("json_schema", lambda s: setattr(s, "json_schema", "{not json")),
    ("json_schema", lambda s: setattr(s, "json_schema", nested(81))),
    ("json_schema", lambda s: setattr(s, "json_schema", nested(100_000))),
    ("json_schema", lambda s: setattr(s, "json_schema", '{"a": 1, "a": 2}')),
    ("json_schema", lambda s: setattr(s, "json_schema", json.dumps({"enum": ["x" * 300_000]}))),
    ("structural_tag", lambda s: setattr(s, "structural_tag", json.dumps({"pattern": "(" * 257}))),
    ("structural_tag", lambda s: setattr(s, "structural_tag", "x" * (12 * limits.MADE_CHARS_MAX + 1))),
]  # fmt: skip


@pytest.fixture
def requests() -> Requests:
    """Without SGLang, which takes long to import: what is refused does not come that far."""
    found = Requests.__new__(Requests)
    found.vocab_size, found.io = 100, None
    return found


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_it_ends_as_an_error_of_that_request_alone(requests: Requests, name: str, change: Callable[[Any], Any]) -> None:
    submit = node_pb2.Submit(input_ids=[1, 2], sampling=node_pb2.Sampling(max_new_tokens=3, temperature=1.0, top_k=1))
    change(submit.sampling)
    sent: list[bytes] = []
    answer = requests.handle([seam.SUBMIT, b"r", b"0", submit.SerializeToString()], sent.append)
    assert answer is not None
    assert (answer["rid"], answer["status"], sent) == ("r", 400, [])
    assert answer["error"].startswith(name)
    assert len(answer["error"]) < 200


numbers = {name: st.floats(low, high) for name, (low, high) in bounds.NUMBERS.items()}


@given(st.fixed_dictionaries({}, optional=numbers))
def test_what_a_gateway_lets_pass_is_not_too_much(fields: dict[str, float]) -> None:
    assert bounds.out_of_bounds(fields) is None
    assert limits.excess(node_pb2.Sampling(**fields)) is None  # type: ignore[arg-type]


def test_the_largest_tools_that_a_gateway_takes_pass_however_they_are_escaped() -> None:
    schema: Any = {"type": "string"}
    for _ in range(28):
        schema = {"properties": {"\U0001f600": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": schema, "description": "\U0001f600" * 130_000}}}]
    assert bounds.out_of_bounds({"tools": tools}) is None
    made = json.dumps({"type": "array", "items": {"anyOf": [{"properties": {"parameters": t}} for t in tools]}})
    assert limits.excess(node_pb2.Sampling(json_schema=made)) is None
    assert limits.excess(node_pb2.Sampling(structural_tag=made)) is None
    assert limits.excess(node_pb2.Sampling(regex="a" * 2048)) is None
    assert limits.excess(node_pb2.Sampling(json_schema="true")) is None
