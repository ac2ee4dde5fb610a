"""The zygote as its parent sees it (asyncio; needs no SGLang in this process).

zygote = Zygote("/run/nitsum/zygote.sock", "/var/log/zygote.log")
await zygote.start()
child = await zygote.fork("package.module:function", {"any": "json"}, log_path="child.log")
status = await child.exited
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitsum_sglang.checkpoint import ARCHITECTURES
from nitsum_sglang.zygote import FRAME_BYTES_MAX, SELF_CHECK_FAILED

PRELOAD_ENGINE = (
    "nitsum_sglang.preload_engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.disaggregation.common.conn",
    "xgrammar",
    "nitsum_sglang.leader",
)
PRELOAD_FRONT = (
    "nitsum_sglang.preload_front",
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "uvloop",
)
START_TIMEOUT_S = 300.0
"""Cold imports from a cold disk, without bytecode, on a busy machine: seen 70 s."""
FORK_TIMEOUT_S = 30.0


class ZygoteEnded(Exception):
    """The zygote is not there (any more); the message carries the tail of its log."""


def unserved_modules() -> str:
    """For SGLANG_DISABLED_MODEL_ARCHS: the files of `sglang.srt.models` that no model of ours needs, some 200, and 2 s to import."""
    found = importlib.util.find_spec("sglang")
    folders = [Path(f, "srt/models") for f in found.submodule_search_locations or ()] if found else []
    return ",".join(
        sorted({f.stem for folder in folders for f in folder.glob("*.py")} - set(ARCHITECTURES.values()) - {"registry", "__init__"})
    )


def environment(device: str = "cpu") -> dict[str, str]:
    """This process's environment with what SGLang must find before it is imported."""
    env = dict(os.environ)
    env |= {
        "SGLANG_USE_PICKLE_IPC": "0",  # its sockets carry pickle by default
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_DISABLED_MODEL_ARCHS": unserved_modules(),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if device == "cpu":
        env |= {
            "NITSUM_CPU_NATIVE": "1",
            "SGLANG_USE_CPU_ENGINE": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHDYNAMO_DISABLE": "1",  # nothing to compile for; also wanted by seeded sampling
            "OMP_NUM_THREADS": "1",
        }
    return env


def log_tail(path: str | Path, bytes_max: int = 4096) -> str:
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - bytes_max))
            return f.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})"


def _ask(socket_path: str, frame: bytes, log_fd: int) -> tuple[dict[str, Any], int, socket.socket | None]:
    """The zygote's answer, and of a child its pidfd and the connection on which its status will come. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(FORK_TIMEOUT_S)
        connection.connect(socket_path)
        socket.send_fds(connection, [frame], [log_fd])
        answer, fds, _, _ = socket.recv_fds(connection, FRAME_BYTES_MAX, 1)
        if not answer:
            raise ConnectionResetError("it closed the connection")
        reply = json.loads(answer)
        if "error" in reply:
            connection.close()
            return reply, -1, None
        connection.setblocking(False)
        return reply, fds[0], connection
    except BaseException:
        connection.close()
        raise


def run_to_end(socket_path: str, target: str, args: Mapping[str, Any], timeout_s: float) -> int:
    """Runs `target(args)` in a child of the zygote that listens there, its log to our stderr, and waits; for callers without an event loop.

    Returns the wait status. Raises OSError where no zygote answers, ValueError for a request that it refuses, TimeoutError: it was killed.
    """
    reply, pidfd, connection = _ask(socket_path, json.dumps({"target": target, "args": dict(args)}).encode(), sys.stderr.fileno())
    if connection is None:
        raise ValueError(f"the zygote refused: {reply['error']}")
    with connection:
        try:
            if not select.select([connection], [], [], timeout_s)[0]:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                raise TimeoutError(f"{target} did not end within {timeout_s:g} s")
        finally:
            os.close(pidfd)
        if not (frame := connection.recv(4096)):
            raise ConnectionResetError("the zygote ended")
        return int(json.loads(frame)["status"])


@dataclass
class Child:
    pid: int
    exited: asyncio.Future[int]
    """Wait status; -1 when only its end is known."""
    pidfd: int = field(default=-1, repr=False)

    def signal(self, number: int) -> None:
        """To the child alone, never to another process that got its pid."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def kill(self) -> int:
        self.signal(signal.SIGKILL)
        return await asyncio.shield(self.exited)


class Zygote:
    def __init__(self, socket_path: str | Path, log_path: str | Path, device: str = "cpu", preload: Sequence[str] = PRELOAD_ENGINE) -> None:
        self.socket_path, self.log_path, self.device, self.preload = str(socket_path), str(log_path), device, tuple(preload)
        self.forks = True
        """False: its self-check failed, every child is a fresh process (slow, but serves)."""
        self._process: asyncio.subprocess.Process | None = None
        self._watchers: set[asyncio.Task[None]] = set()
        if len(os.fsencode(self.socket_path)) > 100:
            raise ValueError(f"socket_path: {self.socket_path} is longer than the 100 bytes that a Unix socket's name may have")

    async def start(self) -> None:
        """Returns when it can fork. Raises ZygoteEnded."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket_path)
        self._process = await self._spawn(self.socket_path, "--preload", ",".join(self.preload))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while self._process.returncode is None and not await asyncio.to_thread(self._answers):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await self.stop()
            raise ZygoteEnded(f"the zygote was not ready within {START_TIMEOUT_S:.0f} s; its log ends: {log_tail(self.log_path)}") from None
        if self._process.returncode == SELF_CHECK_FAILED:
            self.forks = False
        elif self._process.returncode is not None:
            raise ZygoteEnded(f"the zygote ended with status {self._process.returncode}; its log ends: {log_tail(self.log_path)}")

    async def _spawn(self, *args: str, stdin: int = asyncio.subprocess.DEVNULL, log_path: str = "") -> asyncio.subprocess.Process:
        log = os.open(log_path or self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "nitsum_sglang.zygote",
                *args,
                "--parent",
                str(os.getpid()),
                env=environment(self.device),
                stdin=stdin,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _answers(self) -> bool:
        return os.path.exists(self.socket_path)

    @property
    def alive(self) -> bool:
        return not self.forks or (self._process is not None and self._process.returncode is None)

    async def fork(
        self, target: str, args: Mapping[str, Any], *, log_path: str | Path, env: Mapping[str, str] | None = None, title: str = ""
    ) -> Child:
        """Runs `target(args)` in a child that dies with the zygote. Raises ZygoteEnded, or ValueError for a request it refuses."""
        request: dict[str, Any] = {"target": target, "args": dict(args), "env": dict(env or {})}
        if title:
            request["title"] = title
        frame = json.dumps(request).encode()
        if len(frame) > FRAME_BYTES_MAX:
            raise ValueError(f"args: {len(frame)} bytes, over the {FRAME_BYTES_MAX} of one frame")
        if not self.forks:
            return await self._start_fresh(frame, str(log_path))
        try:
            reply, pidfd, connection = await asyncio.to_thread(self._ask, frame, str(log_path))
        except OSError as error:
            raise ZygoteEnded(f"the zygote does not answer ({error}); its log ends: {log_tail(self.log_path)}") from error
        if "error" in reply:
            raise ValueError(f"the zygote refused: {reply['error']}")
        return self._watch(reply["pid"], pidfd, connection)

    def _ask(self, frame: bytes, log_path: str) -> tuple[dict[str, Any], int, socket.socket | None]:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return _ask(self.socket_path, frame, log)
        finally:
            os.close(log)

    async def _start_fresh(self, frame: bytes, log_path: str) -> Child:
        process = await self._spawn("--once", stdin=asyncio.subprocess.PIPE, log_path=log_path)
        assert process.stdin is not None
        process.stdin.write(frame)
        process.stdin.close()
        return self._watch(process.pid, os.pidfd_open(process.pid), None)

    def _watch(self, pid: int, pidfd: int, connection: socket.socket | None) -> Child:
        loop = asyncio.get_running_loop()
        child = Child(pid, loop.create_future(), pidfd)
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)

        async def watch() -> None:
            status = -1
            try:
                await ended.wait()
                loop.remove_reader(pidfd)
                if connection is not None:
                    with contextlib.suppress(OSError, TimeoutError, ValueError):
                        frame = await asyncio.wait_for(loop.sock_recv(connection, 4096), 2)
                        status = json.loads(frame)["status"] if frame else -1
            finally:
                loop.remove_reader(pidfd)
                if connection is not None:
                    connection.close()
                if not child.exited.done():
                    child.exited.set_result(status)
                os.close(pidfd)

        task = loop.create_task(watch())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        return child

    async def stop(self) -> None:
        """Ends the zygote and, by PDEATHSIG, every child of it."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._watchers:
            _, late = await asyncio.wait(self._watchers, timeout=5)
            for task in late:
                task.cancel()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket_path)
