"""Eight kinds of greedy streams, and all that a client can see of each: compared with a stock engine, token for token."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

WORD = {"type": "string", "minLength": 8, "maxLength": 16}
SCHEMA = {
    "type": "object",
    "properties": dict.fromkeys(["city", "river", "mountain", "people", "food", "street"], WORD),
    "required": ["city", "river", "mountain", "people", "food", "street"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": WORD, "country": WORD, "street": WORD},
            "required": ["city", "country", "street"],
        },
    },
}
LONG = " ".join(f"{i}. The quick brown fox jumps over the lazy dog." for i in range(12))

KINDS: dict[str, dict[str, Any]] = {
    "chat": {"q": LONG},
    "tools": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "stop": {"stop": None},
    "json schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    "n=2": {"n": 2},
    "completion": {"prompt": LONG[:200], "logprobs": 1},
}


@dataclass
class Seen:
    """What came back. `times` are seconds of time.monotonic(), one per event that carried output."""

    text: dict[int, str] = field(default_factory=dict)
    tools: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    error: str = ""
    times: list[float] = field(default_factory=list)

    def key(self) -> tuple[Any, ...]:
        """Everything that must be equal; logprobs are compared apart, within a tolerance."""
        return self.text, self.tools, self.finish, self.tokens, self.usage, self.error

    def differs(self, expected: "Seen") -> str:
        """The first difference of each part, short enough to read."""
        if self.error:
            return self.error
        parts = []
        for name, got, wanted in zip(("text", "tools", "finish", "tokens", "usage"), self.key(), expected.key(), strict=False):
            if got != wanted:
                parts.append(f"{name}: {_first_difference(got, wanted)}")
        return "; ".join(parts)


def _first_difference(got: Any, wanted: Any) -> str:
    if not (isinstance(got, dict) and isinstance(wanted, dict)) or got.keys() != wanted.keys():
        return f"{got} instead of {wanted}"
    for i in got:
        at = next((n for n, (a, b) in enumerate(zip(got[i], wanted[i], strict=False)) if a != b), min(len(got[i]), len(wanted[i])))
        if got[i] != wanted[i]:
            return (
                f"choice {i} at {at} of {len(wanted[i])}: {got[i][at : at + 8]!r} instead of {wanted[i][at : at + 8]!r}, {len(got[i])} long"
            )
    return ""


def body(kind: str, model: str, max_tokens: int, stop: str | None = None) -> tuple[str, dict[str, Any]]:
    fields = dict(KINDS[kind])
    if "prompt" in fields:
        path = "/v1/completions"
    else:
        path = "/v1/chat/completions"
        fields["messages"] = [
            {"role": "user", "content": f"Test {kind}. " + fields.pop("q", "Name three colours, one sentence each. " * 3)}
        ]
    if "stop" in fields:
        fields["stop"] = [stop] if stop else None
    common = {"model": model, "temperature": 0, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    return path, {**common, **fields}


async def call(client: httpx.AsyncClient, path: str, request: dict[str, Any], headers: dict[str, str] | None = None) -> Seen:
    seen = Seen()
    async with client.stream("POST", path, json=request, headers=headers or {}, timeout=300) as r:
        if r.status_code != 200:
            seen.error = (await r.aread()).decode()[:500]
            return seen
        async for line in r.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.error = json.dumps(event["error"])[:500]
                return seen
            if event.get("usage"):
                seen.usage = (event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"])
            for choice in event["choices"]:
                _take(seen, choice)
    return seen


def _take(seen: Seen, choice: dict[str, Any]) -> None:
    i, delta, logprobs = choice["index"], choice.get("delta") or {}, choice.get("logprobs") or {}
    piece = delta.get("content") or choice.get("text") or ""
    seen.text[i] = seen.text.get(i, "") + piece
    for call_ in delta.get("tool_calls") or []:
        seen.tools[i] = seen.tools.get(i, "") + (call_["function"].get("name") or "") + (call_["function"].get("arguments") or "")
    if choice.get("finish_reason"):
        seen.finish[i] = choice["finish_reason"]
    rows = [(row["token"], row["logprob"]) for row in logprobs.get("content") or []]
    rows += zip(logprobs.get("tokens") or [], logprobs.get("token_logprobs") or [], strict=False)
    for token, value in rows:
        # Stock SGLang drops the logprobs of a chunk without text (half a character), so such a token's row comes or not, by chance.
        if token:
            seen.tokens.setdefault(i, []).append(token)
            seen.logprobs.setdefault(i, []).append(value or 0.0)
    if piece or delta.get("tool_calls"):
        seen.times.append(time.monotonic())


async def reference(client: httpx.AsyncClient, model: str, max_tokens: int) -> tuple[dict[str, Seen], str]:
    """Each kind alone, one after another. Returns also the stop string, cut out of an unstopped answer."""
    plain = await call(client, *body("stop", model, max_tokens))
    text = plain.text[0]
    stop = text[len(text) * 4 // 5 :][:8]
    return {kind: await call(client, *body(kind, model, max_tokens, stop)) for kind in KINDS}, stop


async def together(client: httpx.AsyncClient, model: str, max_tokens: int, stop: str) -> dict[str, Seen]:
    """All kinds at once."""
    got = await asyncio.gather(*(call(client, *body(kind, model, max_tokens, stop)) for kind in KINDS))
    return dict(zip(KINDS, got, strict=True))
