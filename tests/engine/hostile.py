"""Bodies that a hostile client may send: allowed and private fields, with values of any type and size."""

import json
from typing import Any

from hypothesis import strategies as st

from nitsum_gateway import allowed

PRIVATE = [
    "rid", "custom_params", "priority", "input_ids", "bootstrap_host", "bootstrap_room", "session_params", "session_id", "lora_path",
    "custom_logit_processor", "extra_key", "return_hidden_states", "data_parallel_rank", "routed_dp_rank", "images_config", "watermark",
    "stop_regex", "continue_final_message", "mm_processor_kwargs", "return_token_ids", "kv_hints", "thinking", "task", "sampling_params",
]  # fmt: skip
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7.5, 10**9, 2**31, -(2**63), 2**64, 10**300, 1e308, -1e308, 1e-308, "", "x", "\0", "\ud800", "1e999",
    "NaN", "é" * 3000, "x" * 20_000, [], [[]], [None], [0], [-1], [2**40], [10**30], ["a"] * 40, ["x"] * 10_000, [[1, 2], [3]], [1, "a"],
    {}, {"a": 1}, {"1": 100}, {"1": 1e308}, {"-1": 1}, {"99999999": 1}, {"x": 1}, {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(" * 50_000}}},
    {"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "structural_tag", "structures": [], "triggers": []},
    {"type": "structural_tag", "format": {"type": "regex", "pattern": "(" * 999}},
    "(" * 100_000, "(a+)+$", "root ::= nothing", '{"type":"string"}', '{"a":1,"a":2}', "[" * 100_000, '{"$ref":"#/nowhere"}',
    [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"role": "nobody", "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}],
    [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "tool", "content": "x", "tool_call_id": 7}], [{"role": "user", "content": "\ud83d"}],
    [{"role": "system", "content": "{{ a }}"}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}],
    [{"type": "function", "function": {"name": "\0" * 9, "parameters": {"$ref": "#"}, "strict": True}}], [{"type": "nobody"}],
    "required", "auto", "none", {"type": "function", "function": {"name": "f"}}, {"include_usage": True}, {"include_usage": "x"},
    {"chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"}, {"tokenize": False},
    {"enable_thinking": True}, {"enable_thinking": [1]}, {"thinking_budget": 10**30}, "gold", "low", "fast", "batch",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a|b)+$"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
SWITCHES = [
    "echo", "ignore_eos", "no_stop_trim", "parallel_tool_calls", "separate_reasoning", "skip_special_tokens", "store", "stream",
    "stream_reasoning", "add_special_tokens",
]  # fmt: skip
EDGES: dict[str, list[Any]] = {
    **{name: [True, False, None] for name in SWITCHES},
    "temperature": [0, 1e-300, 1e-7, 1, 2, None], "top_p": [1e-6, 0.5, 1], "min_p": [0, 1], "top_k": [-1, 0, 1, 1 << 30],
    "repetition_penalty": [0.01, 2], "presence_penalty": [-2, 2], "frequency_penalty": [-2, 2], "seed": [0, -(2**63), 2**63 - 1],
    "n": [1, 2, 5], "best_of": [1, 2], "max_tokens": [0, 1, 2, 2000, None], "max_completion_tokens": [0, 1, 2000], "min_tokens": [0, 1, 5],
    "logit_bias": [{}, {"5": 100}, {"5": -100, "999999": 1}, {"0": 0}], "logprobs": [True, False, 0, 5, 20], "top_logprobs": [0, 1, 20],
    "stop": ["", "a", ["", ""], [], ["\n", "é\0"], ["x" * 1024] * 32], "stop_token_ids": [[], [0], [2**31 - 1], list(range(1000))],
    "regex": ["", "a*", "(", "[", "\\", "(a{1,9}){1,9}", "(?=a)", "("*256], "ebnf": ['root ::= "a"', "root ::=", "root ::= nothing", "{"],
    "json_schema": ["", "{}", "true", json.dumps(SCHEMA), '{"$ref":"#"}', '{"type":"nobody"}', '{"enum":[]}'],
    "response_format": [
        {"type": "json_object"}, {"type": "text"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
        {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": SCHEMA}},
    ],
    "tools": [[], [TOOL], [TOOL, TOOL]], "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}],
    "prompt": ["", [], [0], [300, 999_999], ["a", "b"], ["", "a"], [[300], [301, 302]], "\0é\u2028", "x" * 20_000, list(range(3000)),
               list(range(5000))],
    "tokens": [[], [0], [999_999], [[300], [301]], [-1], [2**40]], "suffix": ["", "x"], "user": ["x" * 9000], "metadata": [{"a": "b"}],
    "stream_options": [{"include_usage": True}, {"include_usage": False}, {}], "cache_salt": ["", "a", "x" * 256, "\0"],
    "service_tier": ["fast", "batch", "auto", "default", None], "reasoning_effort": ["low", "none", 0.5],
    "chat_template_kwargs": [{"enable_thinking": True}, {"thinking_budget": 10**30}, {}],
}  # fmt: skip


def values(name: str) -> st.SearchStrategy[Any]:
    """Mostly those at the edges of what may pass: what is refused by the allow-list tells nothing of the parts behind it."""
    messages = [v for v in NASTY if isinstance(v, list) and v and isinstance(v[0], dict) and "role" in v[0]]
    edges = messages if name == "messages" else EDGES.get(name, [])
    wild = st.sampled_from(NASTY) | JSON
    return st.one_of(*[st.sampled_from(edges)] * 4, wild) if edges else wild


BASE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "hi", "max_tokens": 4},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [300, 301]},
}


@st.composite
def requests(draw: st.DrawFn, model: str) -> tuple[str, bytes]:
    """A path and the bytes of a body; most are a good one with a few fields replaced."""
    path = draw(st.sampled_from(sorted(BASE)))
    names = st.sampled_from(sorted(allowed.FIELDS[path]))
    if draw(st.integers(0, 9)) == 0:
        names |= st.sampled_from(PRIVATE) | st.text(max_size=12)
    body = {"model": model, **BASE[path], **{name: draw(values(name)) for name in draw(st.sets(names, min_size=1, max_size=4))}}
    body["model"] = model if draw(st.integers(0, 9)) else body["model"]
    text = json.dumps(body)
    if draw(st.integers(0, 9)) == 0:  # not quite JSON
        text = draw(
            st.sampled_from([text[:-1], text[:-1] + ', "n": NaN}', text[:-1] + ', "temperature": 1e999}', text[:-1] + ', "n": 1, "n": 2}'])
        )
    return path, text.encode()
