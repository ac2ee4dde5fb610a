"""What the host must know after a crash, as JSON lines on local disk: each step of a flip, and the node's epoch."""

import json
import os
from pathlib import Path
from typing import Any

LINES_MAX = 10_000


class Journal:
    """`<state_dir>/journal.jsonl`. A torn last line, the trace of a crash in mid-write, is dropped."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "journal.jsonl"
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        self.entries = [e for e in map(_parsed, lines) if e is not None][-LINES_MAX:]
        whole = b"".join(json.dumps(e).encode() + b"\n" for e in self.entries)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(whole)
        fresh.chmod(0o600)
        os.replace(fresh, self._path)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)

    @property
    def epoch(self) -> int:
        """The highest ever written: a restarted host goes on above it, so that no gateway takes an old group for a new one."""
        return max((int(e.get("epoch", 0)) for e in self.entries), default=0)

    def write(self, **entry: Any) -> None:
        """On disk when it returns."""
        os.write(self._fd, json.dumps(entry).encode() + b"\n")
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
