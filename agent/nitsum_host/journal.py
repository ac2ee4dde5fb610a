"""What the host must know after a crash, as JSON lines on local disk: each step of a flip, and the node's epoch."""

import json
import os
from pathlib import Path
from typing import Any

LINES_MAX = 10_000
"""Kept; twice as many are on disk at most."""


class Journal:
    """`<state_dir>/journal.jsonl`. A torn last line, the trace of a crash in mid-write, is dropped."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "journal.jsonl"
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        self.entries = [e for e in map(_parsed, lines) if e is not None]
        self._fd = -1
        self._torn = False
        self._compact()

    def _compact(self) -> None:
        """The epoch is the highest of all, and may be in a line that goes: the first line that stays carries it."""
        epoch = self.epoch
        self.entries = self.entries[-LINES_MAX:]
        if self.entries and epoch:
            self.entries[0] = self.entries[0] | {"epoch": epoch}
        fresh = self._path.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            _write(fd, b"".join(json.dumps(e).encode() + b"\n" for e in self.entries))
            os.fsync(fd)
            os.replace(fresh, self._path)
        except BaseException:
            os.close(fd)
            raise
        old, self._fd = self._fd, fd
        if old >= 0:
            os.close(old)

    @property
    def epoch(self) -> int:
        """The highest ever written: a restarted host goes on above it, so that no gateway takes an old group for a new one."""
        return max((int(e.get("epoch", 0)) for e in self.entries), default=0)

    def write(self, **entry: Any) -> None:
        """On disk when it returns. Raises OSError."""
        torn, self._torn = self._torn, True  # should this write fail half-way, the next one starts a line of its own
        _write(self._fd, b"\n" * torn + json.dumps(entry).encode() + b"\n")
        os.fsync(self._fd)
        self._torn = False
        self.entries.append(entry)
        if len(self.entries) >= 2 * LINES_MAX:
            self._compact()

    def close(self) -> None:
        os.close(self._fd)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
