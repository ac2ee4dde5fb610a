"""A profile measured on a live, idle SGLang server through /generate: one new token after prompts of several lengths, alone and behind a
cached prefix; then steps of several batches decoding together. Medians, so that a pause or a neighbour spoils a point only if it lasts.

What is timed is what a client at the engine's own door waits; what of it is no step (HTTP, tokenizer, the way back) is found by how much
less a prompt holds up a stream that decodes, and kept apart. Points that do not fit into the
engine's KV are computed from those that do (attention grows with batch x context, chunk x cached) and counted in the note.
"""

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from nitsum.errors import InvalidSpec
from nitsum.perf.tables import MixedStep, Profile, TpTable
from nitsum_cli.smooth import monotone

FIRST_ID, LAST_ID = 10, 250
"""Token ids that any vocabulary has; what they say does not matter, end tokens are ignored."""
KV_SHARE = 0.8
STEPS, STEPS_MAX, TOKENS_LEAST = 24, 96, 12
BURST_S = 0.0005
PAUSE_S = 0.5
DOOR_STEPS, DOOR_PROMPTS, DOOR_MOST = 48, 4, 0.5
TIMEOUT_S = 120.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Points:
    """Where to measure. Trimmed to what the engine takes."""

    chunks: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    cached: tuple[int, ...] = (0, 512, 2048, 8192, 32768)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    contexts: tuple[int, ...] = (64, 512, 2048, 8192, 32768)
    repeats: int = 5


QUICK = Points((16, 64, 256, 1024), (0, 512), (1, 4, 16), (64, 512), 3)


@dataclass(frozen=True)
class Facts:
    """Of the server. `prompt_max`: longest prompt; `chunk_max`: most prefill tokens in one step."""

    model: str
    device: str
    version: str
    tp_size: int
    kv_tokens: int
    prompt_max: int
    chunk_max: int
    running_max: int
    mixed: bool

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Facts":
        kv = int(info["max_total_num_tokens"])
        prompt = int(info.get("max_req_input_len") or info.get("context_length") or kv) - STEPS_MAX
        chunk = int(info.get("chunked_prefill_size") or 0)
        return cls(
            str(info.get("served_model_name") or info["model_path"]),
            str(info.get("device") or "?"),
            str(info.get("version") or "?"),
            int(info["tp_size"]),
            kv,
            min(prompt, int(kv * KV_SHARE)),
            chunk if chunk > 0 else kv,
            int(info.get("max_running_requests") or 0) or kv,
            bool(info.get("enable_mixed_chunk")),
        )


class Engine:
    """A live server. Foreign errors become InvalidSpec."""

    def __init__(self, url: str, api_key: str, seed: int = 1) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=1024)
        self._client = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S, limits=limits)
        self._url, self._random = url, random.Random(seed)

    async def close(self) -> None:
        await self._client.aclose()

    def prompt(self, tokens: int) -> list[int]:
        """Never the same twice, so that nothing of it is cached."""
        return [self._random.randint(FIRST_ID, LAST_ID) for _ in range(tokens)]

    async def pause(self, longest_s: float) -> None:
        """Of random length."""
        await asyncio.sleep(self._random.uniform(0, longest_s))

    async def facts(self) -> Facts:
        try:
            answer = await self._client.get("/server_info")
            answer.raise_for_status()
            return Facts.of(answer.json())
        except httpx.HTTPStatusError as e:
            what = "is not an SGLang server with /server_info" if e.response.status_code == 404 else f"answers {e.response.status_code}"
            remedy = "; its API key comes from the variable that --api-key-env names" if e.response.status_code in (401, 403) else ""
            raise InvalidSpec("--from-engine", f"{self._url} {what}{remedy}") from e
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise InvalidSpec("--from-engine", f"{self._url}: {type(e).__name__}: {e}") from e
        except (ValueError, KeyError, TypeError) as e:
            raise InvalidSpec("--from-engine", f"{self._url}/server_info: not what SGLang 0.5.23 says: {e!r}") from e

    async def flush(self) -> None:
        """Best effort: only old prefixes would be in the way, and SGLang evicts them itself."""
        with_admin_key_only = (400, 401, 403)
        answer = await self._client.post("/flush_cache")
        assert answer.status_code in (200, *with_admin_key_only), answer.text

    async def first_token(self, ids: list[int]) -> tuple[float, int]:
        """(ms until one token is there, prompt tokens found cached)."""
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}}
        begin = time.perf_counter()
        answer = await self._client.post("/generate", json=body)
        ms = (time.perf_counter() - begin) * 1e3
        if answer.status_code != 200:
            raise InvalidSpec("--from-engine", f"{self._url}/generate answers {answer.status_code}: {answer.text[:200]}")
        return ms, int(answer.json()["meta_info"].get("cached_tokens") or 0)

    async def stream(self, ids: list[int], new: int, begun: asyncio.Event | None = None) -> list[tuple[float, int]]:
        """(when, tokens so far) of every message; `begun` is set at the first."""
        sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        seen: list[tuple[float, int]] = []
        async with self._client.stream("POST", "/generate", json={"input_ids": ids, "stream": True, "sampling_params": sampling}) as answer:
            if answer.status_code != 200:
                raise InvalidSpec("--from-engine", f"{self._url}/generate answers {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    seen.append((time.perf_counter(), int(json.loads(line[6:])["meta_info"]["completion_tokens"])))
                    if begun is not None:
                        begun.set()
        return seen


def _bursts(stream: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """(when, tokens by then): messages closer than BURST_S are one."""
    out: list[tuple[float, int]] = []
    last = -math.inf
    for t, n in stream:
        if out and t - last < BURST_S:
            out[-1] = out[-1][0], n
        else:
            out.append((t, n))
        last = t
    return out


def paces_ms(streams: list[list[tuple[float, int]]]) -> list[float]:
    """Time per token of each stream while all of them run, if that is TOKENS_LEAST or more of its tokens. Over the whole time, not from
    message to message: messages come in bursts, on a busy machine a whole stream's in one. What comes at once counts as of then."""
    streams = [_bursts(s) for s in streams]
    begin, end = max(s[0][0] for s in streams), min(s[-1][0] for s in streams)
    found = []
    for s in streams:
        within = [(t, n) for t, n in s if begin <= t <= end]
        if within and (tokens := within[-1][1] - within[0][1]) >= TOKENS_LEAST:
            found.append((within[-1][0] - within[0][0]) / tokens * 1e3)
    return found


async def decode_ms(engine: Engine, batch: int, ctx: int, repeats: int) -> float | None:
    """Median step with `batch` streams around `ctx`; None where they never ran all together."""
    steps, found, runs = STEPS, [], 0
    while steps <= STEPS_MAX and runs < repeats:
        prompts = [engine.prompt(max(ctx - steps // 2, 1)) for _ in range(batch)]
        streams = await asyncio.gather(*(engine.stream(p, steps) for p in prompts))
        if all(streams) and len(paces := paces_ms(streams)) == batch:
            # Each run is one voice: a neighbour that spoils a whole run spoils no more.
            found.append(median(paces))
            runs += 1
        else:
            steps *= 2
    return median(found) if found else None


async def prefill_ms(engine: Engine, chunk: int, prefix: list[int], repeats: int) -> float | None:
    """Median; None where the engine does not keep the prefix."""
    found = []
    for _ in range(repeats):
        ms, cached = await engine.first_token(prefix + engine.prompt(chunk))
        if cached < 0.9 * len(prefix):
            return None
        found.append(ms)
    return median(found)


def held_ms(streams_s: list[tuple[float, float, int]]) -> float:
    """How long a prompt holds a stream up, from (a stream by itself, one that others' prompts came to, how many came) each."""
    return median((beside - by_itself) / prompts * 1e3 for by_itself, beside, prompts in streams_s)


def door_of(whole_ms: float, held: float) -> float:
    """What of a prompt's time is no step. Between 0 and DOOR_MOST of it, whatever a noisy machine says."""
    return min(max(whole_ms - held, 0.0), DOOR_MOST * whole_ms)


async def doors_ms(engine: Engine, chunk: int, ctx: int, repeats: int) -> tuple[float, float]:
    """What a client waits for its first token beyond what it holds others up: (prompts follow at once, they come after a pause as in
    traffic). Then processes that sleep must wake, and a core that did other work is slower."""

    async def stream_s(prompts: int) -> float:
        begun = asyncio.Event()
        stream = asyncio.create_task(engine.stream(engine.prompt(ctx), DOOR_STEPS, begun))
        waiter = asyncio.create_task(begun.wait())
        await asyncio.wait([stream, waiter], return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        for _ in range(prompts):
            await engine.first_token(engine.prompt(chunk))
        seen = await stream
        return seen[-1][0] - seen[0][0]

    pairs, at_once, paused = [], [], []
    for _ in range(repeats):
        pairs.append((await stream_s(0), await stream_s(DOOR_PROMPTS), DOOR_PROMPTS))
        at_once += [(await engine.first_token(engine.prompt(chunk)))[0] for _ in range(2)]
        for _ in range(2):
            await engine.pause(PAUSE_S)
            paused.append((await engine.first_token(engine.prompt(chunk)))[0])
    held = held_ms(pairs)
    return door_of(median(at_once), held), door_of(median(paused), held)


def filled(cells: list[list[float | None]], xs: tuple[int, ...]) -> tuple[list[list[float]], int]:
    """(every cell, how many were computed): what a column adds to the first one grows with x. The first column is whole."""
    out, count = [], 0
    for i, row in enumerate(cells):
        first = row[0]
        assert first is not None, "the first column is measured"
        line = [first]
        for j, value in enumerate(row[1:], 1):
            if value is None:
                count += 1
                # The largest x that has this column; there is one, or the column would not be here.
                k = max(n for n in range(len(cells)) if cells[n][j] is not None)
                there, base = cells[k][j], cells[k][0]
                assert there is not None
                assert base is not None
                value = first + (there - base) * xs[i] / xs[k]
            line.append(value)
        out.append(line)
    return out, count


def _measured_columns(cells: list[list[float | None]], ys: tuple[int, ...]) -> tuple[list[list[float | None]], tuple[int, ...]]:
    """Without the columns in which nothing could be measured."""
    keep = [j for j in range(len(ys)) if any(row[j] is not None for row in cells)]
    return [[row[j] for j in keep] for row in cells], tuple(ys[j] for j in keep)


async def table(engine: Engine, facts: Facts, points: Points, say: Say) -> tuple[TpTable, int]:
    """And the number of cells that were computed."""
    room = int(facts.kv_tokens * KV_SHARE)
    chunks = tuple(c for c in points.chunks if c <= min(facts.prompt_max, facts.chunk_max))
    batches = tuple(b for b in points.batches if b <= facts.running_max and b * (points.contexts[0] + STEPS) <= room)
    contexts = tuple(c for c in points.contexts if c == points.contexts[0] or c <= facts.prompt_max)
    if not chunks or not batches:
        raise InvalidSpec("--from-engine", f"its KV of {facts.kv_tokens} tokens is too small to measure anything")
    await engine.flush()
    for _ in range(2):  # the first requests compile and allocate
        await asyncio.gather(*(engine.stream(engine.prompt(points.contexts[0]), 4) for _ in range(min(4, batches[-1]))))
    columns: list[list[float | None]] = []
    kept = tuple(c for c in points.cached if c + chunks[0] <= facts.prompt_max)
    for cached in kept:
        prefix = engine.prompt(cached)
        if prefix:
            await engine.first_token(prefix)
        column = []
        for chunk in chunks:
            fits = cached + chunk <= facts.prompt_max
            column.append(await prefill_ms(engine, chunk, prefix, points.repeats) if fits else None)
        columns.append(column)
        say(f"prefill behind {cached}: " + ", ".join(f"{c}: {ms:.1f} ms" for c, ms in zip(chunks, column, strict=True) if ms is not None))
    at_once, door_ms = await doors_ms(engine, chunks[len(chunks) // 2], contexts[0], points.repeats)
    say(f"outside the engine's steps: {at_once:.1f} ms of these, {door_ms:.1f} ms in traffic")
    columns = [[ms if ms is None else max(ms - at_once, ms * (1 - DOOR_MOST)) for ms in column] for column in columns]
    cells = [list(row) for row in zip(*columns, strict=True)]
    cells, kept = _measured_columns(cells, kept)
    prefill, computed = filled(cells, chunks)
    decodes: list[list[float | None]] = []
    for batch in batches:
        row: list[float | None] = []
        for ctx in contexts:
            fits = batch * (ctx + STEPS_MAX) <= room or (ctx == contexts[0] and batch * (ctx + STEPS) <= room)
            row.append(await decode_ms(engine, batch, ctx, points.repeats) if fits else None)
        if row[0] is None:
            break  # the engine does not run that many together
        decodes.append(row)
        say(f"decode {batch} at " + ", ".join(f"{c}: {ms:.1f} ms" for c, ms in zip(contexts, row, strict=True) if ms is not None))
    if not decodes:
        raise InvalidSpec("--from-engine", "no decode step could be timed: its streams end before they begin; is it busy?")
    batches = batches[: len(decodes)]
    decodes, contexts = _measured_columns(decodes, contexts)
    decode, more = filled(decodes, batches)
    await engine.flush()
    smooth_decode, _ = monotone(decode)
    smooth_prefill, _ = monotone(prefill)
    axes = [tuple(map(float, axis)) for axis in (batches, contexts, chunks, kept)]
    first = tuple(r[0] for r in smooth_prefill)
    behind, rows = (axes[3], smooth_prefill) if len(kept) > 1 else ((), ())
    return TpTable(axes[0], axes[1], smooth_decode, axes[2], first, facts.kv_tokens, behind, rows, None, door_ms), computed + more


async def measured(url: str, model: str, gpu: str, api_key: str, points: Points, say: Say) -> Profile:
    engine = Engine(url, api_key)
    try:
        facts = await engine.facts()
        say(f"{facts.model} at TP {facts.tp_size} on {facts.device}, SGLang {facts.version}, KV for {facts.kv_tokens} tokens")
        made, computed = await table(engine, facts, points, say)
    except httpx.HTTPError as e:
        raise InvalidSpec("--from-engine", f"{url} failed while it was measured: {type(e).__name__}: {e}") from e
    finally:
        await engine.close()
    name, kind = model or facts.model.rstrip("/").rsplit("/", 1)[-1], gpu or facts.device
    note = (
        f"Measured on a live SGLang {facts.version} at TP {facts.tp_size} through /generate: medians, HTTP apart; "
        f"{computed} of the points computed where KV or prefix cache did not allow them. KV tokens as the engine says. "
        "The fixed part of a flip is modelled."
    )
    mixed = MixedStep.OVERLAP if facts.mixed else MixedStep.SEPARATE
    source = {"tool": "sglang", "version": facts.version}
    return Profile(
        f"{name.rsplit('/', 1)[-1].lower()}.{kind}",
        name,
        kind,
        "measured",
        note,
        {facts.tp_size: made},
        flip_fixed_ms=150.0,
        context_length=facts.prompt_max + STEPS_MAX,
        source=source,
        mixed=mixed,
    )


def profile(url: str, model: str, gpu: str, api_key_env: str, quick: bool, say: Say) -> Profile:
    """Empty `model` and `gpu`: as the server says. Raises InvalidSpec."""
    return asyncio.run(measured(url, model, gpu, os.environ.get(api_key_env, ""), QUICK if quick else Points(), say))
