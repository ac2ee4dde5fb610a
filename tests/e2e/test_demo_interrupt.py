"""Ctrl-C at the entry of each phase of the demo leaves no process, socket, file, mount or shared memory behind; nor do a second Ctrl-C
on the way out. After SIGKILL no process lives on, and what it leaves in files the next demo removes.
SIGTERM and SIGHUP: test_local_processes.py."""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path

import pytest

from nitsum_local.binaries import ensure
from nitsum_local.demo.phases import Phase
from nitsum_sglang.testing.models import tiny_llama

WITH_ENGINES = frozenset({Phase.NODES, Phase.GATEWAY, Phase.POOLS, Phase.TRAFFIC, Phase.REFERENCE, Phase.SUMMARY})
"""Two of these at a time: a whole stage takes 4 GB. The rest have a lane of their own."""
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
    """What outlives a process: sockets (SGLang's too) and folders of ours, shared memory, mounts."""
    files = [*Path("/tmp").glob("nitsum*"), *Path("/tmp").glob("sgl*"), *Path("/dev/shm").iterdir()]
    return {str(f) for f in files} | set(Path("/proc/self/mounts").read_text().splitlines())


def neighbours(trace: str) -> bool:
    """Whether a live process names it, maps it or has it open. None of ours lives when this is asked."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if trace.encode() in (process / "cmdline").read_bytes() or trace.encode() in (process / "maps").read_bytes():
                return True
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(fd).startswith(trace):
                        return True
    return False


@pytest.fixture
def reaper() -> Iterator[None]:
    """Orphans of our children become our children, so that none hides."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short: sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="di", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


async def interrupt(
    phase: Phase, folder: Path, temporary: Path, lanes: tuple[asyncio.Semaphore, asyncio.Semaphore], *signals: signal.Signals
) -> str:
    """What went wrong; empty where nothing did. Signals after the first come on the way out."""
    async with lanes[phase in WITH_ENGINES]:
        words = ["-m", "nitsum_local.demo", "--model", "brief", "--state", str(folder)]
        env = {**os.environ, "TMPDIR": str(temporary)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=env
        )
        assert process.stdout is not None
        said: list[str] = []
        try:
            async with asyncio.timeout(420):
                async for line in process.stdout:
                    said.append(line.decode())
                    if f" {phase}: " in said[-1]:
                        break
                for number in signals:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(number)
                    await asyncio.sleep(0.3)
                said += [line.decode() async for line in process.stdout]
                code = await process.wait()
        except TimeoutError:
            process.kill()
            return f"{phase}: did not end\n{''.join(said)}"
    # The last phase may be over before the signal comes: then the demo says by 2 that it saw no flip.
    expected = -signals[0] if signals[0] is signal.SIGKILL else 128 + signals[0]
    legal = {expected, 2} if phase is Phase.SUMMARY else {expected}
    if code not in legal:
        return f"{phase}, {signals}: exit code {code}\n{''.join(said)}"
    if signals[0] is not signal.SIGKILL and (left := os.listdir(temporary)):
        return f"{phase}, {signals}: left {left}"
    return ""


@pytest.mark.timeout(900)
async def test_ctrl_c_at_every_phase_leaves_nothing(reaper: None, tmp_path: Path, temporary: Path) -> None:
    await asyncio.to_thread(ensure)
    await asyncio.to_thread(tiny_llama)
    processes, before, lanes = set(descendants()), traces(), (asyncio.Semaphore(1), asyncio.Semaphore(2))
    twice = (Phase.NODES, Phase.TRAFFIC)
    runs = [(p, (signal.SIGINT, signal.SIGINT) if p in twice else (signal.SIGINT,)) for p in Phase if p is not Phase.CHART]

    def one(number: int, phase: Phase, signals: tuple[signal.Signals, ...]) -> Coroutine[None, None, str]:
        (temporary / str(number)).mkdir()
        return interrupt(phase, tmp_path / f"{phase.name}{number}", temporary / str(number), lanes, *signals)

    folder, mine = tmp_path / "killed", temporary / "k"
    mine.mkdir()

    async def killed() -> str:
        """The chart's phase is interrupted in the demo that follows a killed one."""
        first = await interrupt(Phase.TRAFFIC, folder, mine, lanes, signal.SIGKILL)
        return first or await interrupt(Phase.CHART, folder, mine, lanes, signal.SIGINT)

    problems = await asyncio.gather(*(one(i, *run) for i, run in enumerate(runs)), killed())
    assert not any(problems), "\n".join(problems)
    left = {pid: line for pid, line in descendants().items() if pid not in processes}
    assert not left, left
    found = {t for t in traces() - before if not neighbours(t)}
    await asyncio.sleep(5 if found else 0)  # a neighbour's may just be on its way out, or in
    assert not {t for t in found & traces() if not neighbours(t)}
