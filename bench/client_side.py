"""A flip as a client sees it: OpenAI streams over HTTPS through the real gateway, agent and engine host, all on this machine.

A stream's gap is the widest time between two of its events that touches the flip, by the engines' own record of when A parked and B
woke. Every stream is sent once more without a flip, and must be the same text.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import memory
from openai import AsyncOpenAI
from work import MOVE_AFTER, PROMPT_TOKENS, prompts

from nitsum_local.demo import flips
from nitsum_local.node import MODEL, Node
from nitsum_sglang.checkpoint import read_facts

OUTPUT_TOKENS = 160
"""More than on the host's side: streams must still run when the directive has come through agent and host."""


@dataclass
class Seen:
    """One stream. `times` has one entry per event that carries a token (time.monotonic()), text or half a character of it."""

    text: str = ""
    tokens: int = 0
    times: list[float] = field(default_factory=list)


async def stream(client: AsyncOpenAI, prompt: list[int], seen: Seen, salt: str) -> Seen:
    extra = {"ignore_eos": True, "cache_salt": salt}
    options: Any = {"include_usage": True}
    events = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=OUTPUT_TOKENS, temperature=0, stream=True, stream_options=options, extra_body=extra
    )
    async for event in events:
        if event.choices:
            seen.times.append(time.monotonic())
            seen.text += event.choices[0].text
        if event.usage:
            seen.tokens = event.usage.completion_tokens
    return seen


@dataclass
class Flips:
    gaps: list[float] = field(default_factory=list)
    first_ms: float = 0.0
    moved: list[int] = field(default_factory=list)
    """Tokens that each stream had when B woke."""
    unmoved: int = 0
    equal: bool = True


async def one_flip(node: Node, client: AsyncOpenAI, work: list[list[int]], tp_size: int, salt: str, into: Flips) -> None:
    seen = [Seen() for _ in work]
    since = time.monotonic()
    running = [asyncio.create_task(stream(client, prompt, s, salt)) for prompt, s in zip(work, seen, strict=True)]
    while any(len(s.times) < MOVE_AFTER for s in seen) and not any(t.done() for t in running):  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    await node.flip_to(tp_size)
    await asyncio.gather(*running)
    (window,) = flips.windows(node.awake_lines(), since)
    gaps = []
    for s in seen:
        pairs = list(zip(s.times, s.times[1:], strict=False))
        if s.times[0] < window.start and s.times[-1] > window.end:
            gaps.append(max((b - a) * 1e3 for a, b in pairs if a <= window.end and b >= window.start))
            into.moved.append(sum(t <= window.end for t in s.times))
        else:
            into.unmoved += 1
    into.gaps += gaps
    into.first_ms = into.first_ms or max(gaps, default=0.0)
    again = await asyncio.gather(*(stream(client, prompt, Seen(), f"{salt}-again") for prompt in work))
    into.equal &= [(s.text, s.tokens) for s in again] == [(s.text, s.tokens) for s in seen]
    into.equal &= all(s.tokens == OUTPUT_TOKENS for s in seen)


async def measure(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    async with Node(folder, model) as node, node.http() as http:
        client = AsyncOpenAI(base_url=node.base_url, api_key="none", http_client=http, max_retries=0)
        at = 1
        for streams in (8, 1):  # the very first flip is one of 8 streams
            got = Flips()
            for i in range(rounds):
                at = 3 - at
                await one_flip(node, client, prompts(streams, 100 * streams + i), at, f"b{streams}-{i}", got)
            out[f"flip_{streams}"] = {
                "gap_ms_p50": round(statistics.median(got.gaps), 1),
                "gap_ms_max": round(max(got.gaps), 1),
                "first_flip_ms_max": round(got.first_ms, 1),
                "moved_after_tokens_p50": round(statistics.median(got.moved)),
                "streams_moved": len(got.gaps),
                "streams_not_moved": got.unmoved,
                "text_equal": got.equal,
            }
        out["processes"] = memory.processes(node.pids())
        out["weights"] = _weights(node, model, out["processes"])
    out["prompt_tokens"] = PROMPT_TOKENS
    return out


def _weights(node: Node, model: Path, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """All resident layouts together, against one copy of the checkpoint."""
    (store_file,), (socket_path,) = node.memory_dir.glob("weights/*.weights"), node.folder.glob("h/w*.sock")
    engines = {}
    for tp in (1, 2):
        pids = [p["pid"] for p in processes if f"/e/e{tp}" in _cwd(p["pid"])]
        engines[f"TP{tp}"] = memory.weights(pids, socket_path, tp)
    one = read_facts(str(model), MODEL).weight_bytes
    held = store_file.stat().st_blocks * 512 + sum(e["private"] for e in engines.values())
    return {
        "one_copy_bytes": one,
        "store_file_bytes": store_file.stat().st_size,
        "engines": engines,
        "all_over_one_copy": round(held / one, 3),
    }


def _cwd(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""
