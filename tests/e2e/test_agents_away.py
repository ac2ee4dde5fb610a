"""Agents that hang: their hosts serve on, and requests still find them, for as long as it takes."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest

from nitsum_local.stage import wait_until

from .conftest import MAX_TOKENS, Expected, System
from .kinds import KINDS, body, call
from .waves import assert_equal

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.xdist_group("system")]


@pytest.mark.timeout(600)
async def test_new_requests_are_served_while_every_agent_hangs(system: System, expected: Expected) -> None:
    await system.until("settled")
    agents = [f"{n.name}.agent" for n in system.stage.nodes]
    for name in agents:
        system.stage.supervisor.kill(name, signal.SIGSTOP)

    def connected(count: int) -> Callable[[], Awaitable[bool]]:
        async def probe() -> bool:
            await system.watch.refresh()
            return bool(system.watch.status["agents"]["connected"] == count)

        return probe

    try:
        await wait_until(connected(0), "the operator misses both agents", 60)
        await asyncio.sleep(3)  # routes are sent each second
        async with system.client() as client:
            asked = {kind: body(kind, system.model, MAX_TOKENS, expected.stop) for kind in KINDS}
            seen = await asyncio.gather(*(call(client, path, request) for path, request in asked.values()))
        assert_equal([dict(zip(asked, seen, strict=True))], expected, system)
        assert await connected(0)(), "they were away all the while"
    finally:
        for name in agents:
            system.stage.supervisor.kill(name, signal.SIGCONT)
        await wait_until(connected(2), "both agents are back", 60)
        await system.until("settled")
