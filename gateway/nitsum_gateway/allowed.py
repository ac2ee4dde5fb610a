"""What a client may set. Everything else is refused by name: a misspelt field must not be swallowed, a private one not reach an engine."""

import json
from typing import Any

from nitsum_gateway.bounds import Wrong, out_of_bounds

COMMON = frozenset(
    [
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stream",
        "stream_options",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "user",
        "metadata",
        "store",
        "service_tier",
        "top_k",
        "min_p",
        "min_tokens",
        "repetition_penalty",
        "regex",
        "ebnf",
        "ignore_eos",
        "stop_token_ids",
        "skip_special_tokens",
        "no_stop_trim",
        "cache_salt",
        "response_format",
    ]
)
FIELDS = {
    "/v1/chat/completions": COMMON
    | frozenset(
        [
            "messages",
            "logprobs",
            "top_logprobs",
            "max_completion_tokens",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "chat_template_kwargs",
            "separate_reasoning",
            "stream_reasoning",
            "reasoning_effort",
        ]
    ),
    "/v1/completions": COMMON | frozenset(["prompt", "logprobs", "echo", "suffix", "best_of", "json_schema"]),
    "/tokenize": frozenset(["model", "prompt", "messages", "add_special_tokens"]),
    "/detokenize": frozenset(["model", "tokens", "skip_special_tokens"]),
}
REQUIRED = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt",),
    "/tokenize": ("prompt", "messages"),
    "/detokenize": ("tokens",),
}
"""One of these must be there."""
DEPTH_MAX = 64
TIER_KEY = "nitsum_tier"
"""In custom_params: set by the dispatcher alone, which refuses what a client puts there; the router reads it."""
NAME_CHARS_MAX = 100


def problem(path: str, body: Any) -> Wrong | None:
    """The first thing that is wrong, None for a body that may pass."""
    if not isinstance(body, dict):
        return Wrong("", "the body must be a JSON object", None)
    if _depth(body) > DEPTH_MAX:
        return Wrong("", f"the body is nested deeper than {DEPTH_MAX} levels", None)
    if (odd := _odd(body)) is not None:
        return Wrong("", odd, None)
    for name in body:
        if name not in FIELDS[path]:
            return Wrong(name[:NAME_CHARS_MAX], f"unknown field {name[:NAME_CHARS_MAX]!r} for {path}", "unknown_parameter")
    if not isinstance(body.get("model"), str):
        return Wrong("model", "model must be a string")
    return _lacks(path, body) or out_of_bounds(body) or _media(body.get("messages"))


def _lacks(path: str, body: dict[str, Any]) -> Wrong | None:
    """What the front would answer with pages about its own code."""
    if all(body.get(name) is None for name in REQUIRED[path]):
        return Wrong(REQUIRED[path][0], f"{' or '.join(REQUIRED[path])} is required", "missing_required_parameter")
    messages = body.get("messages")
    if messages is not None and not isinstance(messages, list):
        return Wrong("messages", "messages must be a list")
    for i, message in enumerate(messages or ()):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Wrong(f"messages[{i}]", f"messages[{i}] must be an object with a role and a content")
        if not isinstance(message.get("content"), str | list | None):
            return Wrong(f"messages[{i}].content", f"messages[{i}].content must be a string or a list of parts")
    if isinstance(body.get("prompt"), dict | int | float):
        return Wrong("prompt", "prompt must be a string, a list of strings or a list of token ids")
    for name in ("stream", "echo", "ignore_eos"):
        if not isinstance(body.get(name), bool | None):
            return Wrong(name, f"{name} must be true or false")
    for name in ("response_format", "stream_options"):
        if not isinstance(body.get(name), dict | None):
            return Wrong(name, f"{name} must be an object")
    return None


def _odd(body: dict[str, Any]) -> str | None:
    """What Python's parser takes for JSON and nobody else does: 1e999, half a surrogate pair."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "the body holds half of a surrogate pair, which is no character"
    except ValueError:
        return "the body holds a number that is out of range"
    return None


def _media(messages: Any) -> Wrong | None:
    """Text only: the server would fetch any other part's URL from inside the cluster."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                return Wrong(f"messages[{i}].content[{j}]", f"messages[{i}].content[{j}]: only parts of type text are taken")
    return None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= DEPTH_MAX:
        depth += 1
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return depth
