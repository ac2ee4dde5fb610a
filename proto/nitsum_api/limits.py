"""Bounds on one request that gateways and engine hosts share: a gateway refuses by the client's own names, a host whatever came through.

A value near float32's edge becomes inf or NaN in an engine's logits, and sampling from those ends the engine for everybody.
"""

import json
import math
from typing import Any

from nitsum_api.node.v1 import node_pb2

NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 2),
}
UNSET = ("top_p", "repetition_penalty")
"""On the wire their zero means 1."""
BIAS_MAX, BIASES_MAX = 100, 1024
STOPS_MAX, STOP_CHARS_MAX, STOP_IDS_MAX = 32, 1024, 1024
GRAMMAR_CHARS_MAX = {"regex": 2048, "ebnf": 8192, "json_schema": 65_536, "response_format": 65_536, "tools": 131_072}
"""Compile time and memory of a grammar grow with its text: 4 MB of alternatives take minutes and gigabytes of an engine's host."""
SCHEMA_DEPTH_MAX = 64
"""5,000 levels fit into 115 kB and take 6 GB."""
PARENS_MAX = 256
"""In one text, which may be a pattern: the engines' grammar compiler recurses into groups, and 100,000 end the engine (SIGSEGV)."""
MADE_CHARS_MAX, MADE_DEPTH_MAX = 2 * GRAMMAR_CHARS_MAX["tools"], SCHEMA_DEPTH_MAX + 16
"""Of what a front makes from tools or a response format: it wraps them, and names each tool twice."""
ADDED_MAX = 64
"""Stops that a chat template or a model's config adds to the client's."""
ESCAPE_MAX = 12
"""Characters of JSON per character of text: two `\\uXXXX`."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: of a key that comes twice, only the last would be seen here. Raises ValueError."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def deep(value: Any, depth_max: int = SCHEMA_DEPTH_MAX) -> str | None:
    """What of a parsed grammar is too much for a compiler that recurses."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > depth_max:
            return f"nested deeper than {depth_max} levels"
        texts = [t for v in level for t in (v if isinstance(v, dict) else (v,)) if isinstance(t, str)]
        if any(t.count("(") > PARENS_MAX for t in texts):
            return f"more than {PARENS_MAX} opening parentheses in one text"
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return None


def excess(s: node_pb2.Sampling) -> str | None:
    """The first field that an engine must not see, and why."""
    for name, (low, high) in NUMBERS.items():
        value = getattr(s, name)
        if not low <= value <= high and not (value == 0 and name in UNSET):  # nan is in no range
            return f"{name}: {value} is not from {low:g} to {high:g}"
    if len(s.logit_bias) > BIASES_MAX or not all(math.isfinite(b) and abs(b) <= BIAS_MAX for b in s.logit_bias.values()):
        return f"logit_bias: at most {BIASES_MAX} numbers from -{BIAS_MAX} to {BIAS_MAX}"
    if len(s.stop_token_ids) > STOP_IDS_MAX + ADDED_MAX:
        return f"stop_token_ids: {len(s.stop_token_ids)}, at most {STOP_IDS_MAX + ADDED_MAX} are taken"
    for stops in (s.stop, s.stop_regex):
        if len(stops) > STOPS_MAX + ADDED_MAX or any(len(t) > STOP_CHARS_MAX for t in stops):
            return f"stop: at most {STOPS_MAX + ADDED_MAX} strings of at most {STOP_CHARS_MAX} characters"
    grammar = s.WhichOneof("grammar")
    return _grammar(grammar, getattr(s, grammar)) if grammar else None


def _grammar(name: str, text: str) -> str | None:
    if name in ("regex", "ebnf"):
        if len(text) > GRAMMAR_CHARS_MAX[name]:
            return f"{name}: {len(text)} characters, at most {GRAMMAR_CHARS_MAX[name]} are taken"
        return (message := deep(text)) and f"{name}: {message}"
    if len(text) > ESCAPE_MAX * MADE_CHARS_MAX:
        return f"{name}: {len(text)} characters are too many"
    try:
        value = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError):
        return f"{name}: not JSON, or a key twice, or nested too deep"
    if (size := len(json.dumps(value, ensure_ascii=False))) > MADE_CHARS_MAX:
        return f"{name}: {size} characters, at most {MADE_CHARS_MAX} are taken"
    return (message := deep(value, MADE_DEPTH_MAX)) and f"{name}: {message}"
