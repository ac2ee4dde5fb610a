"""What a machine lacks for `make demo`, each with a one-line remedy."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nitsum_local.binaries import DEFAULT, GO_LEAST, MODULE, assets, cache_dir, go_version

PYTHON_LEAST = (3, 11)
DISK_LEAST_GB = 20  # the engine's environment is 9.7 GB, the Go build's cache some GB
MEMORY_LEAST_GB = 8


@dataclass(frozen=True)
class Facts:
    """Of this machine; GB are 10**9 bytes."""

    python: tuple[int, int]
    go: tuple[int, int] | None
    build_needed: bool
    environment_there: bool
    disk_free_gb: float
    memory_gb: float
    git: bool
    make: bool


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def missing(facts: Facts) -> list[Missing]:
    """Empty when all is there."""
    found = []
    if facts.python < PYTHON_LEAST:
        found.append(Missing(f"Python 3.11 or later (here: {_dotted(facts.python)})", "apt install python3.11, or uv python install 3.11"))
    if facts.build_needed and (facts.go is None or facts.go < GO_LEAST):
        here = "none" if facts.go is None else _dotted(facts.go)
        found.append(Missing(f"Go 1.26 or later (here: {here})", "install it from https://go.dev/dl, or set KUBEBUILDER_ASSETS"))
    if not facts.environment_there and facts.disk_free_gb < DISK_LEAST_GB:
        found.append(
            Missing(f"{DISK_LEAST_GB} GB of free disk (here: {facts.disk_free_gb:.1f})", "free some, or check out on a larger disk")
        )
    if facts.memory_gb < MEMORY_LEAST_GB:
        found.append(
            Missing(f"{MEMORY_LEAST_GB} GB of memory (here: {facts.memory_gb:.1f})", "use a larger machine, or raise the container's limit")
        )
    for name, there in (("git", facts.git), ("make", facts.make)):
        if not there:
            found.append(Missing(name, f"apt install {name}"))
    return found


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def gather(root: Path) -> Facts:
    """Of this machine, for the checkout at `root`."""
    go, text = shutil.which("go"), ""
    if go is not None:
        text = subprocess.run([go, "version"], capture_output=True, text=True, timeout=60, cwd=MODULE, check=False).stdout.strip()
    there = set(assets())
    return Facts(
        python=sys.version_info[:2],
        go=go_version(text),
        build_needed=any(name not in there and not (cache_dir(text) / name).is_file() for name in DEFAULT),
        environment_there=(root / ".venv").is_dir(),
        disk_free_gb=shutil.disk_usage(root).free / 1e9,
        memory_gb=_memory_bytes() / 1e9,
        git=shutil.which("git") is not None,
        make=shutil.which("make") is not None,
    )


def _memory_bytes() -> int:
    """The machine's, or the cgroup's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def main(say: Callable[[str], None] = print) -> int:
    """Exit code 1 when anything is missing."""
    found = missing(gather(Path.cwd()))
    for one in found:
        say(f"missing: {one}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
