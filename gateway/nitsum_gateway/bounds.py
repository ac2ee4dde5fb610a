"""How much of what a client may set: limits that the OpenAI API has too, and bounds on what would end or stall an engine or a front.

Types are strict: SGLang would take the string "1e999" for a number. A value near float32's edge becomes inf or NaN in an engine's logits,
and sampling from those ends the engine for everybody.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from nitsum_api.limits import (
    BIAS_MAX,
    BIASES_MAX,
    GRAMMAR_CHARS_MAX,
    NUMBERS,
    STOP_CHARS_MAX,
    STOP_IDS_MAX,
    STOPS_MAX,
    deep,
    each_once,
)

CHOICES_MAX = 128
"""Prompts of one request times `n`."""
WHOLE: dict[str, tuple[int, int]] = {
    "n": (1, 64),
    "best_of": (1, 64),
    "top_logprobs": (0, 20),
    "top_k": (-1, 1 << 30),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "min_tokens": (0, 1 << 31),
    "max_tokens": (0, 1 << 31),
    "max_completion_tokens": (0, 1 << 31),
}
SALT_CHARS_MAX = 256
MESSAGES_MAX, TOOLS_MAX = 4096, 128
CHARS_PER_TOKEN = 64
"""No text but white space has so many on average. SGLang's server tokenizes a megabyte in seconds, and no stream of its pool goes on."""
CONTEXT_UNKNOWN = 131_072
TEMPLATE_SWITCHES = frozenset(
    ["enable_thinking", "thinking", "thinking_mode", "thinking_budget", "reasoning_effort", "preserve_thinking", "clear_thinking"]
)
"""Of chat_template_kwargs. Others reach the template engine's own arguments, `chat_template` (a program of the client's) among them."""


class Wrong(NamedTuple):
    param: str
    message: str
    code: str | None = "invalid_value"


def out_of_bounds(body: dict[str, Any]) -> Wrong | None:
    """The first field that is too much, or of a type that hides how much it is. null means unset."""
    for name, value in body.items():
        if value is not None and (check := CHECKS.get(name)) is not None and (message := check(name, value)) is not None:
            return Wrong(name, message)
    prompts, n = body.get("prompt"), body.get("n") or 1
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) and len(prompts) * n > CHOICES_MAX:
        return Wrong("prompt", f"prompt: {len(prompts)} prompts with n {n} are more than {CHOICES_MAX} choices")
    return None


def too_long(body: dict[str, Any], context_length: int) -> Wrong | None:
    """A text that cannot fit into the context, told from its size alone: tokenizing it to find out would stall everybody."""
    most = (context_length or CONTEXT_UNKNOWN) * CHARS_PER_TOKEN
    prompt = body.get("prompt")
    texts = prompt if isinstance(prompt, list) and not all(isinstance(t, int) for t in prompt) else [prompt]
    sizes = {"prompt": max((len(t) for t in texts if isinstance(t, str | list)), default=0)}
    for name in ("messages", "tools"):
        if isinstance(value := body.get(name), list):
            sizes[name] = len(json.dumps(value, ensure_ascii=False)) - 64 * len(value)
    for name, size in sizes.items():
        if size > most:
            message = f"{name}: {size} characters cannot fit into this model's context length of {context_length} tokens"
            return Wrong(name, message, "context_length_exceeded")
    return None


def _number(name: str, value: Any) -> str | None:
    low, high = NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return f"{name} must be a number from {low:g} to {high:g}"
    return None


def _whole(name: str, value: Any) -> str | None:
    low, high = WHOLE[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        return f"{name} must be a whole number from {low} to {high}"
    return None


def _logprobs(name: str, value: Any) -> str | None:
    """A switch of chat, a number of completions: each front checks which."""
    return None if isinstance(value, bool) else _whole("top_logprobs", value) and "logprobs must be true, false or from 0 to 20"


def _bias(name: str, value: Any) -> str | None:
    if not isinstance(value, dict) or len(value) > BIASES_MAX:
        return f"logit_bias must be an object of at most {BIASES_MAX} token ids"
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            return f"logit_bias: {token[:20]!r} is not a token id"
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -BIAS_MAX <= bias <= BIAS_MAX:
            return f"logit_bias: the bias of {token} must be a number from -{BIAS_MAX} to {BIAS_MAX}"
    return None


def _stop(name: str, value: Any) -> str | None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS_MAX or not all(isinstance(s, str) and len(s) <= STOP_CHARS_MAX for s in stops):
        return f"stop must be at most {STOPS_MAX} strings of at most {STOP_CHARS_MAX} characters"
    return None


def _stop_ids(name: str, value: Any) -> str | None:
    if not _ids(value) or len(value) > STOP_IDS_MAX:
        return f"stop_token_ids must be at most {STOP_IDS_MAX} token ids"
    return None


def _tokens(name: str, value: Any) -> str | None:
    """Of /detokenize. The tokenizer's integers are 32 bits without a sign: past them it raises."""
    if not _ids(value) and not (isinstance(value, list) and all(map(_ids, value))):
        return f"{name} must be a list of token ids, or of such lists"
    return None


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in value)


def _salt(name: str, value: Any) -> str | None:
    return None if isinstance(value, str) and len(value) <= SALT_CHARS_MAX else f"{name} must be a string of at most {SALT_CHARS_MAX}"


def _grammar(name: str, value: Any) -> str | None:
    size = len(value) if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False))
    if size > GRAMMAR_CHARS_MAX[name]:
        return f"{name}: {size} characters, at most {GRAMMAR_CHARS_MAX[name]} are taken"
    if name == "json_schema" and isinstance(value, str):  # the engine's parser has no bound on depth
        try:
            value = json.loads(value, object_pairs_hook=each_once)
        except (ValueError, RecursionError):
            return f"{name} must be a JSON schema, written as a string, that names no key twice"
    return (message := deep(value)) and f"{name}: {message}"


def _tools(name: str, value: Any) -> str | None:
    if isinstance(value, list) and len(value) > TOOLS_MAX:
        return f"{name}: {len(value)} tools, at most {TOOLS_MAX} are taken"
    return _grammar(name, value)


def _messages(name: str, value: Any) -> str | None:
    return f"{name}: at most {MESSAGES_MAX} are taken" if isinstance(value, list) and len(value) > MESSAGES_MAX else None


def _template(name: str, value: Any) -> str | None:
    if not isinstance(value, dict) or not set(value) <= TEMPLATE_SWITCHES:
        return f"{name} may hold only {', '.join(sorted(TEMPLATE_SWITCHES))}"
    if not all(isinstance(v, bool | int | float | str) for v in value.values()):
        return f"{name}: values must be true, false, numbers or strings"
    return None


CHECKS: dict[str, Callable[[str, Any], str | None]] = {
    **dict.fromkeys(NUMBERS, _number),
    **dict.fromkeys(WHOLE, _whole),
    **dict.fromkeys(("regex", "ebnf", "json_schema", "response_format"), _grammar),
    "logprobs": _logprobs,
    "logit_bias": _bias,
    "stop": _stop,
    "stop_token_ids": _stop_ids,
    "tokens": _tokens,
    "cache_salt": _salt,
    "tools": _tools,
    "messages": _messages,
    "chat_template_kwargs": _template,
}
