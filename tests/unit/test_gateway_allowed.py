"""No request reaches a private field, whatever it is made of."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_gateway import allowed, bounds

PRIVATE = [
    "rid", "custom_params", "priority", "input_ids", "bootstrap_host", "bootstrap_room", "session_params", "session_id", "lora_path",
    "custom_logit_processor", "extra_key", "return_hidden_states", "data_parallel_rank", "routed_dp_rank", "images_config", "watermark",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from(PRIVATE + sorted(set().union(*allowed.FIELDS.values()))) | st.text(max_size=20)


@pytest.mark.parametrize("path", sorted(allowed.FIELDS))
def test_no_private_field_is_on_the_list(path: str) -> None:
    assert not set(PRIVATE) & allowed.FIELDS[path]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(allowed.FIELDS)), st.dictionaries(NAMES, JSON, max_size=8))
def test_what_passes_holds_allowed_fields_only(path: str, body: dict[str, Any]) -> None:
    wrong = allowed.problem(path, body)
    if wrong is None:
        assert set(body) <= allowed.FIELDS[path]
        assert isinstance(body["model"], str)
    else:
        assert wrong[1]


def test_an_unknown_field_is_named() -> None:
    assert (allowed.problem("/v1/completions", {"model": "m", "prompt": "x", "max_token": 3}) or ("",))[0] == "max_token"


def test_media_are_refused_by_position() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]}
    assert (allowed.problem("/v1/chat/completions", body) or ("",))[0] == "messages[0].content[1]"


def test_a_deep_body_is_refused() -> None:
    deep: Any = "x"
    for _ in range(allowed.DEPTH_MAX + 5):
        deep = [deep]
    assert allowed.problem("/v1/completions", {"model": "m", "prompt": deep}) is not None


PARENS = "(" * 100_000 + "a" + ")" * 100_000


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": "1e999"}, {"temperature": 1e300}, {"temperature": True}, {"top_p": 0}, {"top_p": 1e-300}, {"min_p": -1},
        {"repetition_penalty": 1e-300}, {"frequency_penalty": 3}, {"presence_penalty": [1]}, {"n": True}, {"n": 65}, {"best_of": 99},
        {"seed": 2**63}, {"seed": "1"}, {"top_k": 2**31}, {"max_tokens": -1}, {"max_tokens": 2**40}, {"min_tokens": -1}, {"logprobs": 999},
        {"logprobs": "3"}, {"logit_bias": {"1": 1e308}}, {"logit_bias": {"1": "5"}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"१": 1}},
        {"logit_bias": [1]}, {"logit_bias": {str(i): 1 for i in range(2000)}}, {"stop": ["x"] * 33}, {"stop": "x" * 2000}, {"stop": [1]},
        {"stop_token_ids": [-1]}, {"stop_token_ids": [True]}, {"stop_token_ids": list(range(2000))}, {"cache_salt": ["a"]},
        {"cache_salt": "x" * 300}, {"prompt": ["x"] * 129}, {"regex": "a|" * 3000}, {"regex": "(" * 300}, {"ebnf": "x" * 10_000},
        {"json_schema": "[" * 5000}, {"json_schema": '{"type":"string","type":"array"}'}, {"json_schema": f'{{"pattern":"{"(" * 400}"}}'},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": PARENS[:400]}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {PARENS[:400]: {}}}}}},
        {"stop_regex": "(a+)+$"},
    ],
    ids=lambda f: str(f)[:40],
)  # fmt: skip
def test_what_would_end_or_stall_an_engine_is_refused_by_name(field: dict[str, Any]) -> None:
    wrong = allowed.problem("/v1/completions", {"model": "m", "prompt": "x", **field})
    assert wrong is not None
    assert wrong.param == next(iter(field))
    assert wrong.code in ("invalid_value", "unknown_parameter")


@pytest.mark.parametrize("tokens", [[-1], [2**40], [True], ["x"], [[1], [-1]], [[1], 2], 5, {"1": 2}])
def test_only_token_ids_are_detokenized(tokens: Any) -> None:
    assert (allowed.problem("/detokenize", {"model": "m", "tokens": tokens}) or ("",))[0] == "tokens"
    assert allowed.problem("/detokenize", {"model": "m", "tokens": [[1, 2], []]}) is None


def test_two_prompts_of_many_choices_are_too_many() -> None:
    assert allowed.problem("/v1/completions", {"model": "m", "prompt": ["x"] * 3, "n": 64}) is not None
    assert allowed.problem("/v1/completions", {"model": "m", "prompt": [1] * 3000, "n": 64}) is None


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "documents", "return_dict", "anything"])
def test_a_client_brings_no_template_of_its_own(name: str) -> None:
    body = {"model": "m", "messages": [], "chat_template_kwargs": {name: "{% for a in range(99999) %}{% endfor %}"}}
    assert (allowed.problem("/v1/chat/completions", body) or ("",))[0] == "chat_template_kwargs"
    assert allowed.problem("/v1/chat/completions", body | {"chat_template_kwargs": {"enable_thinking": False}}) is None


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', "1e999", "[[-1e400]]"])
def test_what_no_server_takes_for_json_is_refused(text: str) -> None:
    body = {"model": "m", "prompt": "x", "metadata": json.loads(text)}
    assert allowed.problem("/v1/completions", body) is not None


def test_ordinary_requests_pass() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "pattern": "^(a|b)+$"}}, "required": ["city"]}
    common = {
        "model": "m",
        "temperature": 0,
        "top_p": 1.0,
        "n": 2,
        "seed": 7,
        "stop": ["\n", "END"],
        "logit_bias": {"50256": -100},
        "user": None,
    }
    formatted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    tool = {"type": "function", "function": {"name": "f", "description": "(e.g. x)" * 50, "parameters": schema}}
    chat = {
        "messages": [{"role": "user", "content": "x"}],
        "logprobs": True,
        "top_logprobs": 5,
        "response_format": formatted,
        "tools": [tool],
    }
    assert allowed.problem("/v1/chat/completions", common | chat) is None
    assert allowed.problem("/v1/completions", common | {"prompt": ["x", "y"], "logprobs": 5, "json_schema": json.dumps(schema)}) is None
    assert allowed.problem("/v1/completions", common | {"prompt": [1, 2], "max_tokens": None, "regex": "(a|b)+", "echo": True}) is None


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": "a" * 64_001},
        {"prompt": ["a", "b" * 64_001]},
        {"messages": [{"role": "user", "content": "a" * 70_000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 40_000}] * 2}]},
        {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "description": "a" * 70_000}}]},
    ],
    ids=lambda f: str(f)[:30],
)
def test_a_text_that_cannot_fit_is_refused_before_anybody_tokenizes_it(field: dict[str, Any]) -> None:
    assert (bounds.too_long(field, 1000) or ("", "", ""))[2] == "context_length_exceeded"
    assert bounds.too_long(field, 10_000) is None


@given(st.dictionaries(st.sampled_from(["prompt", "messages", "tools"]), JSON, max_size=3))
def test_any_types_may_come(body: dict[str, Any]) -> None:
    """The front says which are wrong."""
    bounds.too_long(body, 1000)


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/chat/completions", {}, "messages", "missing_required_parameter"),
        ("/v1/chat/completions", {"messages": None}, "messages", "missing_required_parameter"),
        ("/v1/completions", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/v1/chat/completions", {"messages": "hi"}, "messages", "invalid_value"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}, "hi"]}, "messages[1]", "invalid_value"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages[0]", "invalid_value"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ("/v1/completions", {"prompt": 7}, "prompt", "invalid_value"),
        ("/v1/completions", {"prompt": "x", "response_format": 5}, "response_format", "invalid_value"),
        ("/v1/completions", {"prompt": "x", "stream": "maybe"}, "stream", "invalid_value"),
    ],
)
def test_what_is_missing_is_named(path: str, body: dict[str, Any], param: str, code: str) -> None:
    wrong = allowed.problem(path, {"model": "m", **body})
    assert wrong is not None
    assert (wrong.param, wrong.code) == (param, code)


def test_the_name_of_an_unknown_field_is_not_repeated_at_length() -> None:
    wrong = allowed.problem("/v1/completions", {"model": "m", "prompt": "x", "y" * 1_000_000: 1})
    assert wrong is not None
    assert len(wrong.message) < 300
    assert len(wrong.param) < 200
