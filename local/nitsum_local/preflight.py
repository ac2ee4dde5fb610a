"""What a machine lacks for `make demo`, each with a one-line remedy.

`make demo` runs it first of all with the Python that is there, before anything is fetched: standard library only, and it must
load in older Pythons than it asks for.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nitsum_local.binaries import GO_LEAST, MODULE, assets, cache_dir, go_version, needed

PYTHON_LEAST = (3, 11)
DISK_LEAST_GB = 20  # the engine's environment is 11 GB, what Go fetches and caches 5 GB
DISK_LEAST_TO_BUILD_GB = 6
MEMORY_LEAST_GB = 8
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_LEAST_GB = 2  # both pools' weights, KV pools and rings; containers often come with 64 MB


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
    linux_x86_64: bool = True
    uv_there_or_made: bool = True
    shared_memory_free_gb: float = 64.0
    interface: bool = True


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def missing(facts: Facts) -> list[Missing]:
    """Empty when all is there."""
    found = []
    if not facts.linux_x86_64:
        found.append(Missing("Linux on x86-64", "use such a machine, or a virtual machine of that kind"))
    if facts.python < PYTHON_LEAST:
        found.append(Missing(f"Python 3.11 or later (here: {_dotted(facts.python)})", "apt install python3.11, or uv python install 3.11"))
    elif not facts.uv_there_or_made:
        found.append(Missing("Python's venv, which fetches uv", "apt install python3-venv, or install uv (https://docs.astral.sh/uv)"))
    if facts.build_needed and (facts.go is None or facts.go < GO_LEAST):
        here = "none" if facts.go is None else _dotted(facts.go)
        found.append(Missing(f"Go 1.26 or later (here: {here})", "install it from https://go.dev/dl, or set KUBEBUILDER_ASSETS"))
    disk_gb = (DISK_LEAST_TO_BUILD_GB if facts.build_needed else 0) if facts.environment_there else DISK_LEAST_GB
    if facts.disk_free_gb < disk_gb:
        found.append(Missing(f"{disk_gb} GB of free disk (here: {facts.disk_free_gb:.1f})", "free some, or check out on a larger disk"))
    if facts.memory_gb < MEMORY_LEAST_GB:
        found.append(
            Missing(f"{MEMORY_LEAST_GB} GB of memory (here: {facts.memory_gb:.1f})", "use a larger machine, or raise the container's limit")
        )
    if facts.shared_memory_free_gb < SHARED_MEMORY_LEAST_GB:
        what = f"{SHARED_MEMORY_LEAST_GB} GB free in {SHARED_MEMORY} (here: {facts.shared_memory_free_gb:.1f})"
        found.append(Missing(what, f"mount -o remount,size=4g {SHARED_MEMORY}; of a container: --shm-size=4g"))
    if not facts.interface:
        remedy = "connect a network (or, as root: ip link add d0 type dummy; ip addr add 192.0.2.2/24 dev d0; ip link set d0 up)"
        found.append(Missing("an IPv4 interface with a route, since Kubernetes takes no loopback endpoints", remedy))
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
        build_needed=any(name not in there and not (cache_dir(text) / name).is_file() for name in needed()),
        environment_there=any(root.glob(".venv/lib/python3*/site-packages/sglang")),
        disk_free_gb=min(_free_bytes(folder) for folder in (root, cache_dir(text))) / 1e9,
        memory_gb=_memory_bytes() / 1e9,
        git=shutil.which("git") is not None,
        make=shutil.which("make") is not None,
        uv_there_or_made=shutil.which("uv") is not None or (root / ".nitsum/uv/bin/uv").exists() or find_spec("ensurepip") is not None,
        linux_x86_64=sys.platform == "linux" and platform.machine() == "x86_64",
        shared_memory_free_gb=shutil.disk_usage(SHARED_MEMORY).free / 1e9 if SHARED_MEMORY.is_dir() else 0.0,
        interface=_interface(),
    )


def _free_bytes(folder: Path) -> int:
    """Of the disk on which the folder is, or will be made."""
    return shutil.disk_usage(next(f for f in (folder, *folder.absolute().parents) if f.exists())).free


def _interface() -> bool:
    """What `install.local_address` needs: a route out. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return s.connect_ex(("192.0.2.1", 9)) == 0


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
    """Exit code 1 when anything is missing. Says so when nothing is."""
    found = missing(gather(Path.cwd()))
    for one in found:
        say(f"missing: {one}")
    if not found:
        say("nothing is missing")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
