"""Where tests kill a process on purpose: see `nitsum.faults.FaultPoint`."""

import os
import signal
from pathlib import Path

from nitsum.faults import FaultPoint


def maybe_die(point: FaultPoint, state_dir: Path | None = None) -> None:
    """SIGKILLs this process if NITSUM_FAULT names the point, or if the file `fault` in its state folder does (then once only)."""
    if state_dir is not None:
        try:
            if (file := state_dir / "fault").read_text().strip() == point:
                file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        except FileNotFoundError:
            pass
    if os.environ.get("NITSUM_FAULT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
