"""Where tests kill a process on purpose: see `nitsum.faults.FaultPoint`."""

import os
import signal
from pathlib import Path

from nitsum.faults import FaultPoint


def maybe_die(point: FaultPoint, state_dir: Path | None = None) -> None:
    """SIGKILLs this process if NITSUM_FAULT names the point, or, once, if the file `fault` does that lies in its state folder or in the
    folder NITSUM_FAULT_DIR (for the operator, which keeps no state of its own)."""
    if os.environ.get("NITSUM_FAULT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
    for folder in (state_dir, os.environ.get("NITSUM_FAULT_DIR")):
        if not folder:
            continue
        try:
            if (file := Path(folder, "fault")).read_text().strip() == point:
                file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        except FileNotFoundError:
            pass
