"""Agent, operator, an engine, a node's engine host: each SIGKILLed in the middle of a flip, at a point that hurts, under streams.

Nothing is lost that has a client and a host to run on, nothing is repeated, and no GPU ever has two engines awake.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nitsum.faults import FaultPoint
from nitsum_local.demo import flips
from nitsum_local.stage import wait_until

from .conftest import Expected, System
from .waves import assert_equal, layout_of, waves_until

pytestmark = pytest.mark.asyncio(loop_scope="session")
NODE = "node-0"


@dataclass(frozen=True)
class Kill:
    """`tier`: whose waves make the planner flip to `tp_size`, in the middle of which the process dies."""

    point: FaultPoint
    process: str
    tier: str
    tp_size: int


FLIPS_MAX = 2
"""There and back. The planner ends groups with little KV first, so a flip may find no stream to resume."""
KILLS = [
    Kill(FaultPoint.AGENT_FLIPPING, f"{NODE}.agent", "agents", 1),
    Kill(FaultPoint.OPERATOR_HALF_SENT, "operator", "interactive", 2),
    Kill(FaultPoint.ENGINE_RESUMING, "engine", "agents", 1),
    Kill(FaultPoint.HOST_PARKED, f"{NODE}.host", "interactive", 2),
]


def folders(system: System, kill: Kill) -> list[Path]:
    """Where a file `fault` arms a process. Of engines any will do: a flip resumes streams where there are some."""
    if kill.process == "engine":
        return sorted(system.stage.run_dir.glob("*/h/e/default.tiny-tp*"))
    return [system.stage.fault_dir(kill.process)]


def note_died(system: System, kill: Kill, where: Path) -> None:
    """The engines that died with it, unless an earlier kill ended them."""
    now = time.monotonic()
    for file in [where / "awake.jsonl"] if kill.process == "engine" else system.stage.run_dir.glob(f"{NODE}/h/e/*/awake.jsonl"):
        for line in file.read_text().splitlines() if kill.process == "engine" or kill.process.endswith(".host") else ():
            system.died.setdefault(json.loads(line)["pid"], now)


@contextlib.asynccontextmanager
async def armed(system: System, kill: Kill) -> AsyncIterator[Callable[[], bool]]:
    """Gives whether a process has died at the point; fails unless one does."""
    places = folders(system, kill)
    assert places, f"nothing to arm for {kill}"
    (places[0] / "fault").write_text(kill.point)
    for where in places[1:]:  # one file for all: a stream that met its end is not to meet another one on the engine that it goes to
        (where / "fault").hardlink_to(places[0] / "fault")

    async def watch() -> None:
        async def fired() -> bool:
            return any(not (where / "fault").exists() for where in places)

        await wait_until(fired, f"{kill.process} dies at {kill.point}", 600, poll_s=0.02)
        for where in places:
            if (where / "fault").exists():
                (where / "fault").unlink(missing_ok=True)
            else:
                note_died(system, kill, where)

    watching = asyncio.create_task(watch())
    try:
        yield watching.done
        assert watching.done(), f"{kill.process} never came to {kill.point}\n{system.logs()}"
    finally:
        watching.cancel()
        for where in places:
            (where / "fault").unlink(missing_ok=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", KILLS, ids=lambda k: k.point.value)
async def test_streams_survive_a_kill(system: System, expected: Expected, kill: Kill) -> None:
    away = ("interactive", 2) if kill.tp_size == 1 else ("agents", 1)
    await system.until("settled")  # where the kill before this one has left it, there is nothing to flip away from
    there = system.watch.status.get("layout") == layout_of(away[1])
    async with system.client() as client:
        waves = [] if there else await waves_until(system, client, away[0], expected.stop, away[1])
        async with armed(system, kill) as fired:
            for tier, tp_size in ((kill.tier, kill.tp_size), away) * FLIPS_MAX:
                waves += await waves_until(system, client, tier, expected.stop, tp_size)
                if fired():
                    break
    assert_equal(waves, expected, system)
    overlaps = flips.overlaps(system.stage.awake_lines(), system.died)
    assert not overlaps, overlaps
