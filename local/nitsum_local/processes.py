"""Local processes: each in a session of its own, with a log file, stopped in reverse order, none left behind.

A child that dies takes what is left of its process group with it; when this process dies, the kernel signals every child
(`under.py`). The kernel ties a child to the *thread* that started it: run the loop in a thread that lasts.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from nitsum_local.binaries import under

Ready = Callable[[], Awaitable[bool]]
_POLL_S = 0.1
_TAIL_BYTES = 2000


class ProcessFailed(RuntimeError):
    """A process ended or was not ready in time; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Spec:
    """What to run. `env` is added to this process's environment."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ready: Ready | None = None
    ready_timeout_s: float = 60.0
    stop_deadline_s: float = 10.0  # from SIGTERM to SIGKILL of the whole group
    restart: bool = False  # on every exit that was not asked for, as a kubelet would
    restarts_max: int = 20
    backoff_max_s: float = 5.0
    death_signal: int = signal.SIGTERM  # what the child gets when this process dies


class Process:
    """One running process; made by `Supervisor.start`."""

    def __init__(self, spec: Spec, log: Path) -> None:
        self.spec, self.log, self.restarts = spec, log, 0
        self._child: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """None while it is not running."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    @property
    def returncode(self) -> int | None:
        return None if self._child is None else self._child.returncode

    def tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError), self.log.open("rb") as f:
            f.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return f.read().decode(errors="replace")
        return ""

    async def spawn(self) -> None:
        argv = [*under(self.spec.death_signal), *self.spec.command]
        with self.log.open("ab") as log:
            self._child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.spec.env},
                cwd=self.spec.cwd,
                start_new_session=True,
            )
        if self._watch is None:
            self._watch = asyncio.create_task(self._watching(), name=f"watch {self.spec.name}")

    async def _watching(self) -> None:
        backoff_s = 0.2
        while True:
            assert self._child is not None
            started_s = time.monotonic()
            await self._child.wait()
            self.signal_group(signal.SIGKILL)  # what it left of its group
            if self._stopping or not self.spec.restart or self.restarts >= self.spec.restarts_max:
                return
            if time.monotonic() - started_s > 30:
                backoff_s = 0.2
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, self.spec.backoff_max_s)
            self.restarts += 1
            await self.spawn()

    def signal_group(self, number: int) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, number)

    async def wait_ready(self) -> None:
        """Raises ProcessFailed when it ends, or is not ready, within `ready_timeout_s`."""
        deadline_s = time.monotonic() + self.spec.ready_timeout_s
        while self.spec.ready is not None and not await self.spec.ready():
            if self.returncode is not None and not self.spec.restart:
                raise ProcessFailed(f"{self.spec.name} ended with {self.returncode}; {self.log}:\n{self.tail()}")
            if time.monotonic() > deadline_s:
                raise ProcessFailed(f"{self.spec.name} is not ready after {self.spec.ready_timeout_s:g} s; {self.log}:\n{self.tail()}")
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """SIGTERM to the process, SIGKILL to its group after the deadline or once it has left."""
        self._stopping = True
        if self._child is None:
            return
        try:
            if self._child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._child.terminate()
                async with asyncio.timeout(self.spec.stop_deadline_s):
                    await self._child.wait()
        except TimeoutError:
            pass
        finally:
            self.signal_group(signal.SIGKILL)
            if self._watch is not None:
                self._watch.cancel()
        await self._child.wait()


class Supervisor:
    """Starts processes and stops all of them, last started first. `async with` stops on every way out."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._processes: dict[str, Process] = {}  # in order of start
        self._remove: list[Path] = []
        logs.mkdir(parents=True, exist_ok=True)

    async def __aenter__(self) -> "Supervisor":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop_all()

    def __getitem__(self, name: str) -> Process:
        return self._processes[name]

    def remove_at_end(self, *paths: Path) -> None:
        """Sockets, folders in /dev/shm: gone after the last process."""
        self._remove += paths

    async def start(self, spec: Spec) -> Process:
        """Returns when it is ready; raises ProcessFailed. What failed to become ready is stopped by `stop_all`."""
        old = self._processes.pop(spec.name, None)
        assert old is None or old.pid is None, f"{spec.name} is running"
        process = self._processes[spec.name] = Process(spec, self.logs / f"{spec.name}.log")
        await process.spawn()
        await process.wait_ready()
        return process

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """A fault: signals the process, not its group. What it leaves of its group is killed when it has gone."""
        if (pid := self._processes[name].pid) is not None:
            os.kill(pid, number)

    async def stop(self, name: str) -> None:
        if name in self._processes:
            await self._processes[name].stop()
            self._processes.pop(name, None)

    async def stop_together(self, names: Sequence[str]) -> None:
        """Those that need no order among each other."""
        await asyncio.gather(*(self.stop(name) for name in names))

    async def stop_all(self) -> None:
        """Not stopped by cancellation: a second Ctrl-C does not leave processes behind."""
        task = asyncio.ensure_future(self._stop_all())
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(task)
        task.result()

    async def _stop_all(self) -> None:
        for name in reversed(list(self._processes)):
            await self.stop(name)
        for path in self._remove:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._remove.clear()


def run(main: Coroutine[None, None, int], say: Callable[[str], None] = lambda line: None) -> int:
    """Runs `main` to its exit code. SIGINT, SIGTERM and SIGHUP (the terminal is gone) cancel it, so that every `async with` ends;
    then the code is 130, 143 or 129, unless `main` takes it for its end and returns its own. Under `nohup` a hang-up stays ignored.
    `say` hears of it, but not when the terminal is gone."""
    caught: list[int] = []

    async def outer() -> int:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            caught.append(number)
            if len(caught) == 1:  # more do not disturb the way out: every step of it has a deadline
                task.cancel()
                tell("stopping what was started ...")

        def tell(line: str) -> None:
            if signal.SIGHUP not in caught:
                say(line)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, on_signal, number)
        try:
            code = await task
        except asyncio.CancelledError:
            if not caught:
                raise
            code = 128 + caught[0]
        if caught:
            tell("all gone")
        return code

    return asyncio.run(outer())
