"""Apply a pool, and live streams survive flips that the planner decided: every kind of stream, equal to a stock engine token for token."""

import statistics
import time

import pytest

from nitsum_local.demo import flips

from .conftest import Expected, System
from .waves import assert_equal, waves_until

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.timeout(900)
async def test_streams_survive_what_the_planner_decides(system: System, expected: Expected) -> None:
    began, flipped = time.monotonic(), system.watch.flips
    async with system.client() as client:
        waves = await waves_until(system, client, "agents", expected.stop, 1)
        waves += await waves_until(system, client, "interactive", expected.stop, 2)  # it may change again once they are over
    assert_equal(waves, expected, system)
    lines = system.stage.awake_lines()
    assert not flips.overlaps(lines, system.died), flips.overlaps(lines, system.died)
    windows = [w for n in system.stage.nodes for w in flips.windows([x for x in lines if x["gpus"][0].startswith(n.name)], began)]
    # The first layout may have had one node at TP 1 already.
    assert len(windows) >= 3, f"one of two nodes flips there and back, the other at least there: {windows}"
    gaps = [
        max(b - a for a, b in zip(s.times, s.times[1:], strict=False)) * 1e3
        for w in waves
        for s in w.values()
        if s.times and any(s.times[0] < f.start and s.times[-1] > f.end for f in windows)
    ]
    assert len(gaps) >= 8, f"too few streams crossed a flip: {len(gaps)} in {len(waves)} waves"
    await system.watch.refresh()
    status = system.watch.status
    assert system.watch.flips >= flipped + 2, status
    assert status["plan"]["profileOrigin"] == "modelled"
    assert {f["outcome"] for f in status["lastFlips"]} == {"Done"}
    print(f"{len(waves)} waves, {len(gaps)} streams across a flip, gap p50 {statistics.median(gaps):.0f} ms, max {max(gaps):.0f} ms")
