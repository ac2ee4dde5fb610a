"""The state folder of an engine, and what a killed one leaves: sockets, files under its TMPDIR, shared memory named after its processes."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

from nitsum_sglang import seam

SHM = Path("/dev/shm")


def running(pid: int) -> bool:
    """False for a zombie too: it holds nothing any more."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def prepare(state_dir: str | Path) -> None:
    """An empty folder of the engine's own; the remains of an earlier engine in it are removed, processes first."""
    state = Path(state_dir)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.chmod(0o700)
    kill(state)
    clear(state)
    (state / "tmp").mkdir(mode=0o700)


def error(state_dir: str | Path) -> str:
    """Why the leader gave up, in its own words."""
    with contextlib.suppress(OSError):
        return Path(state_dir, "error").read_text()
    return ""


def ranks(state_dir: str | Path) -> list[int]:
    """Schedulers of this folder that still run. A number is checked against the environment: it may be another process's by now."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for pid in json.loads(Path(state_dir, "remains.json").read_text())["pids"]:
            with contextlib.suppress(OSError):
                if running(pid) and str(Path(state_dir)) in os.readlink(f"/proc/{pid}/cwd"):
                    found.append(pid)
    return found


def kill(state_dir: str | Path) -> None:
    for pid in ranks(state_dir):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def unlink_shared_memory(state_dir: str | Path) -> list[str]:
    """Takes the engine's names out of /dev/shm; processes that have it mapped keep it. Returns the paths removed."""
    removed = []
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        about = json.loads(Path(state_dir, "remains.json").read_text())
        names += [f"sgl_shm_*_{pid}_*" for pid in about["pids"]] + [f"sglang_loads_{about['instance']}*"]
    for pattern in names:
        for path in SHM.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                removed.append(str(path))
    return removed


def clear(state_dir: str | Path) -> list[str]:
    """Removes what an ended engine of this folder left; call it only when its processes are gone. Returns the paths removed."""
    state_dir = Path(state_dir)
    removed = unlink_shared_memory(state_dir)
    for address in seam.addresses(str(state_dir)).values():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.removeprefix("ipc://"))
            removed.append(address)
    shutil.rmtree(state_dir / "tmp", ignore_errors=True)
    for path in (state_dir / "remains.json", state_dir / "error"):
        path.unlink(missing_ok=True)
    return removed
