"""A bounded folder of KV pages that several processes share without talking to each other.

One file per (page, run of KV heads), heads outermost, so that a reader takes its own heads as one slice of whatever file holds them:
a TP 2 rank reads half of TP 1's files, a TP 1 rank reads two of TP 2's. Files appear by rename, so they are whole; a file that is gone is a
miss. The bytes in use are one counter under a lock; who would exceed the budget removes the least recently used files first.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOW_WATER = 0.9
"""Share of the budget that an eviction leaves, so that evictions are rare."""
PARTIAL_AGE_S = 60.0
"""A half-written file this old was left by a process that died."""


@dataclass(frozen=True)
class Run:
    """Heads [first, first + count) of one page."""

    first: int
    count: int


def runs(total_heads: int, own: Run) -> Iterator[list[Run]]:
    """The ways in which the heads of `own` may lie in files, likeliest first: as this TP writes them, wider files, narrower files."""
    widths = [w for w in range(1, total_heads + 1) if total_heads % w == 0]
    for width in [own.count, *(w for w in widths if w > own.count), *(w for w in reversed(widths) if w < own.count)]:
        first = own.first // width * width
        cover = [Run(start, width) for start in range(first, own.first + own.count, width)]
        if cover[-1].first + width >= own.first + own.count:
            yield cover


class PageStore:
    """`head_bytes` is the size of one KV head of one page, all layers, K and V. Nothing here raises OSError: a failure is a miss."""

    def __init__(self, directory: str, namespace: str, total_heads: int, head_bytes: int, max_bytes: int) -> None:
        self.root, self.total_heads, self.head_bytes, self.max_bytes = Path(directory), total_heads, head_bytes, max_bytes
        self.folder = self.root / namespace
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.counter = self.root / "used"

    def _path(self, key: str, run: Run) -> str:
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return f"{self.folder}/{name}.{run.first}-{run.count}"

    def _cover(self, key: str, own: Run) -> list[Run] | None:
        for cover in runs(self.total_heads, own):
            if all(os.path.exists(self._path(key, run)) for run in cover):
                return cover
        return None

    def has(self, key: str, own: Run, touch: bool = False) -> bool:
        """`touch` makes the page recently used, so that it is still there when it is read a moment later."""
        cover = self._cover(key, own)
        if cover is not None and touch:
            for run in cover:
                with contextlib.suppress(OSError):
                    os.utime(self._path(key, run))
        return cover is not None

    def read(self, key: str, own: Run, into: memoryview) -> bool:
        """Fills `into` with the heads of `own`, head by head. False: a miss, `into` is undefined."""
        return any(self._read(key, own, cover, into) for cover in runs(self.total_heads, own))

    def _read(self, key: str, own: Run, cover: list[Run], into: memoryview) -> bool:
        place = 0
        try:
            for run in cover:
                first, last = max(run.first, own.first), min(run.first + run.count, own.first + own.count)
                size = (last - first) * self.head_bytes
                fd = os.open(self._path(key, run), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if os.preadv(fd, [into[place : place + size]], (first - run.first) * self.head_bytes) != size:
                        return False
                finally:
                    os.close(fd)
                place += size
        except OSError:
            return False
        return True

    def write(self, pages: dict[str, bytes | memoryview], own: Run) -> int:
        """Stores what is not there yet, within the budget. Returns the pages written; fewer are no error."""
        new = {key: data for key, data in pages.items() if not self.has(key, own)}
        size = own.count * self.head_bytes
        with contextlib.suppress(OSError):
            granted = self._reserve(len(new) * size) // size if new else 0
            written = 0
            for key, data in list(new.items())[:granted]:
                written += self._write(self._path(key, own), data)
            return written
        return 0

    def _write(self, path: str, data: bytes | memoryview) -> bool:
        partial = f"{path}.{os.getpid()}.partial"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", buffering=0) as f:
                if f.write(data) != len(data):
                    raise OSError("the memory folder is full")
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            return False
        return True

    def used_bytes(self) -> int:
        """As accounted; at least what the files hold, but for what a crash left behind, until the next eviction counts afresh."""
        with contextlib.suppress(OSError, struct.error):
            return int(struct.unpack("<q", self.counter.read_bytes())[0])
        return 0

    def _reserve(self, size: int) -> int:
        """Bytes of `size` that may be written now; makes room first."""
        fd = os.open(self.counter, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            data = os.pread(fd, 8, 0)
            used = struct.unpack("<q", data)[0] if len(data) == 8 else self._files_bytes()
            size = min(size, int(self.max_bytes * LOW_WATER))
            if used + size > self.max_bytes:
                used = self._evict(int(self.max_bytes * LOW_WATER) - size)
            granted = max(0, min(size, self.max_bytes - used))
            os.pwrite(fd, struct.pack("<q", used + granted), 0)
            return granted
        finally:
            os.close(fd)

    def _files(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, path) of every page of every namespace."""
        found = []
        for folder in (e for e in os.scandir(self.root) if e.is_dir()):
            for entry in os.scandir(folder.path):
                with contextlib.suppress(OSError):
                    info = entry.stat()
                    found.append((info.st_mtime, info.st_size, entry.path))
        return found

    def _files_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _evict(self, target: int) -> int:
        """Removes files, least recently used first, until at most `target` bytes are left; returns the bytes left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        young = time.time() - PARTIAL_AGE_S
        for used_at, size, path in files:
            if left <= max(target, 0):
                break
            if path.endswith(".partial") and used_at > young:
                continue
            with contextlib.suppress(OSError):
                os.unlink(path)
                left -= size
        return left
