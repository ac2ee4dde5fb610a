"""What engines that did not end by themselves leave: an open interval in their own log, and of a killed host perhaps a process."""

import asyncio
import contextlib
import json
import logging
import time
from pathlib import Path

from nitsum_sglang import remains

log = logging.getLogger(__name__)
GONE_S = 10.0


def close_interval(state_dir: str | Path) -> None:
    """When no process of the engine is left: it was awake until now at most. So the logs alone tell who was awake when."""
    path = Path(state_dir, "awake.jsonl")
    with contextlib.suppress(OSError, ValueError, IndexError):
        last = json.loads(path.read_bytes().splitlines()[-1])
        if last["event"] == "wake":
            line = last | {"t": time.clock_gettime(time.CLOCK_MONOTONIC), "event": "park", "ended": True}
            with path.open("ab") as f:
                f.write(json.dumps(line).encode() + b"\n")


async def end_all(folder: Path) -> None:
    """Of an earlier host on this folder: nothing of its engines is left when it returns. Raises TimeoutError."""
    for state_dir in sorted(folder.glob("*")):  # noqa: ASYNC240
        if remains.ranks(state_dir):
            log.warning("engine processes of an earlier host are ended: %s", state_dir.name)
        deadline = time.monotonic() + GONE_S
        while remains.ranks(state_dir):
            remains.kill(state_dir)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of an earlier engine in {state_dir} do not end")
            await asyncio.sleep(0.01)
        remains.clear(state_dir)
        close_interval(state_dir)
