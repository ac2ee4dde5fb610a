"""Demand moves from one tier to another, and groups follow it on real engines without a flip; streams go on, and status says so."""

import re
import time
from typing import Any

import pytest
import yaml

from nitsum_local.demo.watch import change_pool

from .conftest import ROOT, Expected, System
from .waves import assert_equal, waves_while

pytestmark = pytest.mark.asyncio(loop_scope="session")
TIERS = [
    {"name": "interactive", "ttft": "5s", "tpot": "120ms", "target": "90%", "default": True},
    {"name": "agents", "ttft": "5s", "tpot": "200ms", "target": "90%"},
    {"name": "batch"},
]
"""Targets that the profile's TP 1 can hold, so that there is something to share out."""


def groups_of(status: dict[str, Any], tier: str) -> int:
    """From text such as `3xTP1 agents, 1xTP1 interactive+agents`."""
    found = re.findall(r"(\d+)xTP\d+ (\S+?)(?:,|$)", (status.get("plan") or {}).get("serving", ""))
    return sum(int(n) for n, tiers in found if tier in tiers.split("+"))


@pytest.mark.timeout(900)
async def test_groups_follow_demand_without_a_flip(system: System, expected: Expected) -> None:
    spec = yaml.safe_load((ROOT / "examples/tiny.yaml").read_text())["spec"]
    stage, watch = system.stage, system.watch
    await change_pool(stage.api, "default", "tiny", {"tiers": TIERS, "tensorParallel": {"allowed": [1]}})
    try:
        async with system.client() as client:

            def at_tp1(status: dict[str, Any]) -> bool:
                return status.get("layout") == "4xTP1" and groups_of(status, "interactive") < 3 <= groups_of(status, "agents")

            waves = await waves_while(system, client, "agents", expected.stop, at_tp1, "most groups serve agents alone")
            before, began, flips = dict(watch.status), time.monotonic(), watch.flips
            now: dict[str, Any] = {}  # when it was so: after the last stream demand is gone, and groups may follow that

            def moved(status: dict[str, Any]) -> bool:
                now.update(status)
                return groups_of(status, "interactive") >= 3

            waves += (after := await waves_while(system, client, "interactive", expected.stop, moved, "most groups serve interactive"))
        await watch.refresh()
        assert (now["layout"], watch.flips, watch.status["layout"]) == ("4xTP1", flips, "4xTP1")
        assert now["plan"]["id"] == before["plan"]["id"], "the layout is the same"
        assert not [line for line in stage.awake_lines() if line["t"] > began], "no engine was parked or woken"
        assert_equal(waves, expected, system)
        row = {t["name"]: t for t in now["tiers"]}
        assert row["interactive"]["slack"].endswith("x")
        assert row["interactive"]["binding"]
        print(f"{before['plan']['serving']} -> {now['plan']['serving']}; {len(after)} streams meanwhile")
    finally:
        await change_pool(stage.api, "default", "tiny", {k: spec[k] for k in ("tiers", "tensorParallel")})
        await system.until("settled")
