"""What a front's errors become: made as SGLang makes them, from FastAPI's and pydantic's own exceptions."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, field_validator

from nitsum_gateway import dispatcher
from nitsum_gateway.wording import public

BODY = {"model": "m", "custom_params": {"nitsum_tier": "fast"}}
CONTEXT: Any = {"function": "chat", "path": "POST /v1/chat/completions", "file": "/usr/lib/sglang/http_server.py", "line": 1870}


class Message(BaseModel):
    role: str


class Asked(BaseModel):
    messages: list[Message]
    effort: str = ""
    size: int = 0

    @field_validator("effort")
    @classmethod
    def known(cls, value: str) -> str:
        if value:
            raise ValueError("it's not an effort")
        return value


def refused(body: dict[str, Any]) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Asked.model_validate(body)
    return caught.value


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (BODY, "messages", "messages: Field required"),
        ({**BODY, "messages": [{"role": "a"}, {"x": "(' loc"}]}, "messages[1].role", "messages[1].role: Field required"),
        ({**BODY, "messages": [], "effort": "x"}, "effort", "effort: Value error, it's not an effort"),
        ({**BODY, "messages": [], "size": "y"}, "size", "size: Input should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_validation_error_keeps_its_field_and_loses_the_rest(body: dict[str, Any], param: str, said: str) -> None:
    errors = [{**e, "loc": ("body", *e["loc"])} for e in refused(body).errors()]
    fastapi = RequestValidationError(errors, endpoint_ctx=CONTEXT)
    text = f"{fastapi} {fastapi.errors()}"
    assert "http_server.py" in text
    for message in (text, str(fastapi)):
        r = dispatcher._openai_error(400, json.dumps({"object": "error", "message": message, "code": 400}))
        told = json.loads(r.body)["error"]
        assert (r.status_code, told["message"], told["param"], told["type"]) == (400, said, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("location", "param"),
    [
        (("messages", 0, "function-after[check_role(), UserParam]", "role"), "messages[0].role"),
        (("effort", "literal['none','low']"), "effort"),
        (("prompt", "list[int]", 0), "prompt[0]"),
        (("tool_choice", "ToolChoice"), "tool_choice"),
        (("messages", 0, "content", "str"), "messages[0].content"),
    ],
)
def test_names_of_types_are_no_fields(location: tuple[str | int, ...], param: str) -> None:
    message = "Input should be a valid dictionary"
    error = {"type": "x", "loc": ("body", *location), "msg": message + " or instance of ToolChoice", "input": "'loc': ('a',), 'msg': 'b'"}
    assert public(400, str(RequestValidationError([error], endpoint_ctx=CONTEXT))) == (f"{param}: {message}", param)
    own = "1 validation error for Asked\n" + ".".join(map(str, location)) + f"\n  {message} [type=x, input_value=1, input_type=int]\n"
    assert public(400, own) == (f"{param}: {message}", param)


def test_pydantics_own_text_too() -> None:
    assert public(400, str(refused(BODY))) == ("messages: Field required", "messages")


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (400, 'bad\n  File "/usr/lib/x.py", line 3', "the request is not valid: a field has the wrong type or value"),
        (400, "custom_params is wrong", "the request is not valid: a field has the wrong type or value"),
        (500, "Traceback (most recent call last): ...", "the server failed on this request"),
        (503, "no group (a: ended the stream: UNAVAILABLE ipv4:10.0.0.3:7443)", "no group"),
        (503, "/var/lib/nitsum/x/y is not there", "the pool cannot serve this request now"),
        (400, "too large: 1000000.This model supports at most 8.", "too large: 1000000. This model supports at most 8."),
        (400, "temperature must be non-negative, got -1.0", "temperature must be non-negative, got -1.0"),
        (404, "no route POST /v1/chat/completions", "no route POST /v1/chat/completions"),
    ],
)
def test_other_texts(status: int, text: str, said: str) -> None:
    assert public(status, text) == (said, None)


def test_when_to_come_back_is_kept() -> None:
    r = dispatcher._openai_error(503, json.dumps({"message": "no group (10.0.0.3:7443) [retry after 2500 ms]"}))
    assert (json.loads(r.body)["error"]["message"], r.headers["retry-after"]) == ("no group", "3")


@given(st.integers(400, 599), st.text(max_size=200), st.text(max_size=200))
def test_whatever_stands_around_it(status: int, before: str, after: str) -> None:
    message, _ = public(status, f'{before}  File "/usr/lib/sglang/http_server.py", line 1870, in f custom_params{after}')
    assert "sglang" not in message
    assert "custom_params" not in message


class Answer:
    """A front's stream."""

    def __init__(self, kind: str) -> None:
        self.headers = {"content-type": kind}

    async def aclose(self) -> None:
        pass


SPOKEN = 'data: {"choices": [{"text": "data: {\\"error\\": 1}"}]}\n\n'
LEAK = 'data: {"error": {"message": "node a-1: ended the stream: ipv4:10.0.0.3:7444 (/usr/lib/x/y.py)", "code": 503}}\n\n'


async def relayed(parts: list[bytes], kind: str = "text/event-stream") -> bytes:
    async def chunks() -> AsyncIterator[bytes]:
        for c in parts[1:]:
            yield c

    answer: Any = Answer(kind)
    return b"".join([c async for c in dispatcher._chunks(answer, parts[0], chunks())])


@given(st.lists(st.integers(0, 400), max_size=6))
def test_an_error_in_the_middle_of_a_stream_is_scrubbed_however_it_is_cut(cuts: list[int]) -> None:
    sent = (SPOKEN + LEAK + "data: [DONE]\n\n").encode()
    at = [0, *sorted(min(c, len(sent)) for c in cuts), len(sent)]
    parts = [sent[a:b] for a, b in itertools.pairwise(at)]
    got = asyncio.run(relayed(parts)).decode()
    assert got.startswith(SPOKEN), "what a model says is not touched"
    assert got.endswith("\n\ndata: [DONE]\n\n")
    [line] = [x for x in got.splitlines() if x.startswith('data: {"error"')]
    assert "10.0.0.3" not in line
    wanted = {"message": "the pool cannot serve this request now", "type": "service_unavailable", "param": None, "code": None}
    assert json.loads(line[6:])["error"] == wanted
    assert asyncio.run(relayed(parts, "application/json")) == sent


def test_a_stream_that_is_cut_off_inside_an_error_shows_nothing_of_it() -> None:
    got = asyncio.run(relayed([SPOKEN.encode(), LEAK[:80].encode()])).decode()
    assert "ipv4" in LEAK[:80]
    assert "ipv4" not in got
    assert '"the server failed on this request"' in got
