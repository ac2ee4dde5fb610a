"""Dies at a named point, once: for tests that kill an engine where it hurts.

The point's name stands in NITSUM_FAULT, or in the file `fault` of the engine's state folder, which may be written while it runs and is
removed as it fires. One file may be linked into the folders of several engines: the first that comes by empties it for all.
"""

import fcntl
import os
import signal
from pathlib import Path

from nitsum.faults import FaultPoint


def visit(point: FaultPoint) -> None:
    state_dir = os.environ.get("NITSUM_STATE_DIR")
    if not state_dir:
        return
    armed, done = Path(state_dir, "fault"), Path(state_dir, f"fault.{point}.done")
    if os.environ.get("NITSUM_FAULT") == point and not done.exists():
        done.touch()
    else:
        try:
            with armed.open("r+") as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                if f.read().strip() != point:
                    return
                f.truncate(0)
            armed.unlink(missing_ok=True)  # every rank comes by; the first one dies, and the others with it
        except FileNotFoundError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
