"""Agent, operator, an engine, a node's engine host: each SIGKILLed in the middle of a flip, at a point that hurts, under streams.

Nothing is lost that has a client and a host to run on, nothing is repeated, and no GPU ever has two engines awake.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nitsum.faults import FaultPoint
from nitsum_local.demo import flips
from nitsum_local.stage import wait_until

from .conftest import Expected, System
from .waves import assert_equal, waves_until

pytestmark = pytest.mark.asyncio(loop_scope="session")
NODE = "node-0"


@dataclass(frozen=True)
class Kill:
    """`tier`: whose waves make the planner flip to `tp_size`, in the middle of which the process dies."""

    point: FaultPoint
    process: str
    tier: str
    tp_size: int


KILLS = [
    Kill(FaultPoint.AGENT_FLIPPING, f"{NODE}.agent", "agents", 1),
    Kill(FaultPoint.OPERATOR_HALF_SENT, "operator", "interactive", 2),
    Kill(FaultPoint.ENGINE_RESUMING, "engine", "agents", 1),
    Kill(FaultPoint.HOST_PARKED, f"{NODE}.host", "interactive", 2),
]


def folder(system: System, kill: Kill) -> Path:
    """Where a file `fault` arms the process."""
    if kill.process == "engine":
        (found,) = (system.stage.run_dir / NODE / "h/e").glob(f"default.tiny-tp{kill.tp_size}-0-*")
        return found
    return system.stage.fault_dir(kill.process)


@contextlib.asynccontextmanager
async def armed(system: System, kill: Kill) -> AsyncIterator[None]:
    """Fails unless the process died at its point. Notes which engines died with it, and when."""
    where = folder(system, kill)
    trigger, done = where / "fault", where / f"fault.{kill.point}.done"
    trigger.write_text(kill.point)

    async def watch() -> None:
        async def fired() -> bool:
            return done.exists() or not trigger.exists()

        await wait_until(fired, f"{kill.process} dies at {kill.point}", 600, poll_s=0.02)
        now = time.monotonic()
        for line in system.stage.awake_lines():
            on_node = line["gpus"][0].startswith(NODE)
            if on_node and (kill.process.endswith(".host") or (kill.process == "engine" and line["engine"] == where.name)):
                system.died.setdefault(line["pid"], now)  # a pid that an earlier kill ended died then, not now

    watching = asyncio.create_task(watch())
    try:
        yield
        assert watching.done(), f"{kill.process} never came to {kill.point}\n{system.logs()}"
    finally:
        watching.cancel()
        trigger.unlink(missing_ok=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", KILLS, ids=lambda k: k.point.value)
async def test_streams_survive_a_kill(system: System, expected: Expected, kill: Kill) -> None:
    away = ("interactive", 2) if kill.tp_size == 1 else ("agents", 1)
    async with system.client() as client:
        waves = await waves_until(system, client, away[0], expected.stop, away[1])
        async with armed(system, kill):
            waves += await waves_until(system, client, kill.tier, expected.stop, kill.tp_size)
    assert_equal(waves, expected, system)
    overlaps = flips.overlaps(system.stage.awake_lines(), system.died)
    assert not overlaps, overlaps
