"""Hostile requests through every real part, down to the engines: none ends an engine or a front."""

import asyncio
import os
from collections import Counter
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from ..engine import hostile
from .conftest import System

pytestmark = pytest.mark.asyncio(loop_scope="session")
FUZZ_EXAMPLES = int(os.environ.get("NITSUM_FUZZ_EXAMPLES", "150"))
LEAVES_S = 2.0
"""A client that waits longer than this for the next byte leaves: some bodies ask for 2,000 tokens."""
EXPECTED = (200, 400, 404, 413, 429, 503)
"""429 and 503: streams of clients that left may still fill the queues."""


def engines(system: System) -> set[int]:
    """Pids of engines that have been awake and live."""
    return {line["pid"] for line in system.stage.awake_lines() if Path(f"/proc/{line['pid']}").exists()}


@pytest.mark.timeout(600)
async def test_no_request_ends_an_engine(system: System) -> None:
    await system.serves()
    before = engines(system)
    assert before
    async with system.client() as client:
        r = await client.post("/v1/completions", json={"model": system.model, "prompt": "hi", "json_schema": '{"$ref":"#"}'})
        assert (r.status_code, r.json()["error"]["message"][:8]) == (400, "grammar:"), r.text
    url, context, answers = system.stage.base_url, system.stage.ssl_context(), Counter[int]()

    def run() -> None:
        with httpx.Client(base_url=url, verify=context, timeout=httpx.Timeout(30, read=LEAVES_S)) as client:

            @settings(max_examples=FUZZ_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(hostile.requests(system.model))
            def fuzz(request_: tuple[str, bytes]) -> None:
                path, body = request_
                try:
                    r = client.post(path, content=body, headers={"content-type": "application/json"})
                except httpx.ReadTimeout:
                    answers[0] += 1
                    return
                answers[r.status_code] += 1
                assert r.status_code in EXPECTED, (path, body[:400], r.status_code, r.text[:400])
                if r.status_code not in (200, 503):
                    assert set(r.json()["error"]) == {"message", "type", "param", "code"}, (path, body[:400], r.text[:400])

            fuzz()

    await asyncio.to_thread(run)
    print(f"answers by status, 0 for clients that left: {dict(answers)}")
    assert answers[200] > FUZZ_EXAMPLES // 20, answers
    assert before <= engines(system), system.logs()
    await system.serves()
