"""A live SGLang server: what it says of itself, and when tokens come from it."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx

from nitsum.errors import InvalidSpec
from nitsum_cli.measure.points import KV_SHARE, STEPS_MAX

FIRST_ID, LAST_ID = 10, 250
"""Token ids that any vocabulary has; what they say does not matter, end tokens are ignored."""
TIMEOUT_S = 120.0


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
