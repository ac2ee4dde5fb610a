"""Real processes: none outlives its supervisor, its stop, or its leader."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nitsum_local.processes import ProcessFailed, Spec, Supervisor


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def started(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program])


async def gone(pid: int) -> bool:
    for _ in range(50):
        if not alive(pid):
            return True
        await asyncio.sleep(0.1)
    return False


def content(file: Path) -> str:
    return file.read_text() if file.exists() else ""


async def pid_in(file: Path) -> int:
    for _ in range(50):
        if text := content(file).strip():
            return int(text)
        await asyncio.sleep(0.1)
    raise AssertionError(f"{file} stays empty")


async def test_deaf_process_and_its_children_end_at_the_deadline(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "log") as s:
        command = ["sh", "-c", f"trap '' TERM; sleep 100 & echo $! > {tmp_path}/child; wait; sleep 100"]
        process = await s.start(Spec("deaf", command, stop_deadline_s=0.3))
        child, leader = await pid_in(tmp_path / "child"), process.pid
        (tmp_path / "shm").mkdir()
        s.remove_at_end(tmp_path / "shm")
    assert leader is not None
    assert await gone(leader)
    assert await gone(child)
    assert not (tmp_path / "shm").exists()


async def test_killed_process_comes_back_where_asked(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "log") as s:
        process = await s.start(Spec("back", ["sleep", "100"], restart=True))
        first = process.pid
        s.kill("back")
        for _ in range(50):
            if process.restarts == 1 and process.pid not in (None, first):
                break
            await asyncio.sleep(0.1)
        assert process.pid not in (None, first)


async def test_process_that_ends_before_it_is_ready_fails_with_its_log(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    async with Supervisor(tmp_path / "log") as s:
        with pytest.raises(ProcessFailed, match="no such pool"):
            await s.start(Spec("bad", ["sh", "-c", "echo no such pool; exit 3"], ready=never))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
async def test_nothing_outlives_the_supervising_process(tmp_path: Path, number: int) -> None:
    program = f"""
import asyncio, signal, sys
from pathlib import Path
from nitsum_local.processes import Spec, Supervisor, run
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, as it should be
async def main():
    async with Supervisor(Path({str(tmp_path)!r}) / "log") as s:
        p = await s.start(Spec("one", ["sleep", "100"]))
        Path({str(tmp_path)!r}, "pid").write_text(str(p.pid))
        await asyncio.sleep(100)
    return 0
sys.exit(run(main()))
"""
    process = started(program)
    child = await pid_in(tmp_path / "pid")
    await asyncio.sleep(0.1)
    process.send_signal(number)
    assert await asyncio.to_thread(process.wait, 10) == (-number if number == signal.SIGKILL else 128 + number)
    assert await gone(child)


async def test_a_second_signal_does_not_shorten_the_way_out(tmp_path: Path) -> None:
    """The one that hangs gets its SIGKILL, and what must go with it goes."""
    program = f"""
import asyncio, sys
from pathlib import Path
from nitsum_local.processes import Spec, Supervisor, run
async def main():
    async with Supervisor(Path({str(tmp_path)!r}) / "log") as s:
        s.remove_at_end(Path({str(tmp_path)!r}) / "shm")
        p = await s.start(Spec("deaf", ["sh", "-c", "trap '' TERM; echo > {tmp_path}/deaf; while :; do sleep 1; done"], stop_deadline_s=1))
        while not Path({str(tmp_path)!r}, "deaf").exists():
            await asyncio.sleep(0.05)
        Path({str(tmp_path)!r}, "pid").write_text(str(p.pid))
        await asyncio.sleep(100)
    return 0
sys.exit(run(main()))
"""
    (tmp_path / "shm").mkdir()
    process = started(program)
    child = await pid_in(tmp_path / "pid")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        await asyncio.sleep(0.2)
    assert await asyncio.to_thread(process.wait, 10) == 128 + signal.SIGINT
    assert await gone(child)
    assert not (tmp_path / "shm").exists()


@pytest.mark.parametrize(("takes_it", "code"), [(False, 130), (True, 0)])
async def test_an_interrupted_run_says_so_and_what_stays_up_until_then_may_call_it_success(takes_it: bool, code: int) -> None:
    program = f"""
import asyncio, sys
from nitsum_local.processes import run
async def main():
    print("up", flush=True)
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        if not {takes_it}:
            raise
    return 0
sys.exit(run(main(), lambda line: print(line, flush=True)))
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    out, _ = await process.communicate()
    assert out.decode().splitlines() == ["stopping what was started ...", "all gone"]
    assert process.returncode == code
