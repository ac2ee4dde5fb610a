"""Ctrl-C at the entry of each phase of the demo leaves no process, socket, mount or shared memory behind."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nitsum_local.binaries import ensure
from nitsum_local.demo.phases import Phase
from nitsum_sglang.testing.models import tiny_llama

AT_ONCE = 3
"""Most of a run is waiting: more at once fill two cores."""
PR_SET_CHILD_SUBREAPER = 36


def descendants() -> dict[int, str]:
    """Command lines of all processes below this one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)] = int(fields[1])
    found: dict[int, str] = {}
    below = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= new
        for pid in new:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def traces() -> set[str]:
    """What outlives a process: sockets and folders of ours, shared memory, mounts."""
    files = [*Path("/tmp").glob("nitsum*"), *Path("/dev/shm").iterdir()]
    return {str(f) for f in files} | set(Path("/proc/self/mounts").read_text().splitlines())


@pytest.fixture
def reaper() -> Iterator[None]:
    """Orphans of our children become our children, so that none hides."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


async def interrupt(phase: Phase, folder: Path, free: asyncio.Semaphore) -> str:
    """What went wrong; empty where nothing did."""
    async with free:
        words = ["-m", "nitsum_local.demo", "--model", "brief", "--state", str(folder)]
        env = {**os.environ, "TMPDIR": "/tmp"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=env
        )
        assert process.stdout is not None
        said: list[str] = []
        try:
            async with asyncio.timeout(240):
                async for line in process.stdout:
                    said.append(line.decode())
                    if f" {phase}: " in said[-1]:
                        break
                process.send_signal(signal.SIGINT)
                said += [line.decode() async for line in process.stdout]
                code = await process.wait()
        except TimeoutError:
            process.kill()
            return f"{phase}: did not end\n{''.join(said)}"
    # The last phase may be over before the signal comes: then the demo says by 2 that it saw no flip.
    legal = {130, 2} if phase is Phase.SUMMARY else {130}
    return "" if code in legal else f"{phase}: exit code {code}\n{''.join(said)}"


@pytest.mark.timeout(900)
async def test_ctrl_c_at_every_phase_leaves_nothing(reaper: None, tmp_path: Path) -> None:
    await asyncio.to_thread(ensure)
    await asyncio.to_thread(tiny_llama)
    processes, before, free = set(descendants()), traces(), asyncio.Semaphore(AT_ONCE)
    problems = await asyncio.gather(*(interrupt(p, tmp_path / p.name, free) for p in Phase))
    assert not any(problems), "\n".join(problems)
    left = {pid: line for pid, line in descendants().items() if pid not in processes}
    assert not left, left
    assert not traces() - before
