"""One process imports SGLang once; engines (and the gateway's fronts) are forked from it in about a second instead of half a minute.

usage: python -m nitsum_sglang.zygote SOCKET --parent PID [--preload MODULE,...]      started by zygote_client, environment by it too
One connection per child on a 0600 SOCK_SEQPACKET socket, frames of JSON:
  -> {"target": "package.module:function", "args": {...}, "env": {...}, "title": "..."} with the log's fd attached
  <- {"pid": N} with a pidfd attached, or {"error": text}; then {"status": wait status} when the child has ended.
The child calls `function(args)` and exits 0, or 1 after a traceback. All of it dies with the parent (PDEATHSIG), children with it.
`--once` runs one request from stdin in this very process: the fallback where forking is not safe.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from typing import Any

FRAME_BYTES_MAX = 1 << 17
ENV_ALLOWED = {"CUDA_VISIBLE_DEVICES", "SGLANG_CPU_OMP_THREADS_BIND", "TMPDIR", "PROMETHEUS_MULTIPROC_DIR"}
"""Many SGLANG_*, LD_* and OMP_* variables are read while importing: a child may differ from its zygote only in these, and in NITSUM_*."""
LIBC = ctypes.CDLL(None, use_errno=True)
"""Loaded here, for a child between fork and exec must not."""
SELF_CHECK_FAILED = 3
"""Exit status: forking is not safe here, use --once."""


def threads() -> list[str]:
    """Names of this process's threads. fork() copies only the calling one: a lock that another holds stays held for ever."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as f:
            names.append(f.read().strip())
    return names


def die_with_parent(parent: int) -> None:
    """SIGKILL when the parent's forking thread ends. The check closes the gap in which it ended before we asked."""
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def preload(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)


def self_check() -> str:
    """Why this process must not fork; empty: it may."""
    if len(names := threads()) != 1:
        return f"threads before fork: {names}"
    for module in ("grpc", "prometheus_client"):
        if module in sys.modules:
            return f"{module} is loaded before fork"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA was initialised while importing: a forked child could not use it"
    return ""


def renew_zmq() -> None:
    """The one ZMQ context that SGLang creates while importing (PD disaggregation): a context must not cross a fork."""
    conn = sys.modules.get("sglang.srt.disaggregation.common.conn")
    if conn is not None:
        conn.CommonKVReceiver._ctx = importlib.import_module("zmq").Context()


def become_child(request: dict[str, Any], log_fd: int, parent: int) -> None:
    """Undoes what a fork shares and an exec would not."""
    os.setsid()
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, as_fd in ((null, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(fd, as_fd)
    os.close(null)
    os.close(log_fd)
    os.environ.update(request["env"])
    tempfile.tempdir = None  # TMPDIR anew
    import multiprocessing

    multiprocessing.current_process().authkey = os.urandom(32)
    if "numpy" in sys.modules:  # random and tempfile reseed themselves, numpy does not
        sys.modules["numpy"].random.seed(random.SystemRandom().getrandbits(32))
    renew_zmq()


def call(request: dict[str, Any]) -> int:
    """Runs the target. Returns the exit status."""
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(request["title"])
    try:
        module, _, function = request["target"].partition(":")
        getattr(importlib.import_module(module), function)(request["args"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def checked(frame: bytes) -> dict[str, Any]:
    """The request of a frame. Raises ValueError that says what is wrong with it."""
    request = json.loads(frame)
    if not isinstance(request, dict) or not isinstance(request.get("target"), str) or ":" not in request["target"]:
        raise ValueError("target: wanted 'package.module:function'")
    env = request.setdefault("env", {})
    refused = sorted(name for name in env if name not in ENV_ALLOWED and not name.startswith("NITSUM_"))
    if refused:
        raise ValueError(f"env: {refused} cannot differ from the zygote's; allowed are NITSUM_* and {sorted(ENV_ALLOWED)}")
    request.setdefault("args", {})
    request.setdefault("title", "nitsum: " + request["target"])
    return request


class Zygote:
    """Answers requests until SIGTERM, in one thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = os.umask(0o177)
        self.listener.bind(path)
        os.umask(before)
        self.listener.listen(16)
        self.wake, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wake_write)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.children: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> pid, connection
        self.poll = selectors.DefaultSelector()
        self.poll.register(self.listener, selectors.EVENT_READ)
        self.poll.register(self.wake, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any] | None:
        """Returns the request in each forked child, None in the zygote at its end."""
        while True:
            for key, _ in self.poll.select():
                if key.fileobj == self.wake:
                    with contextlib.suppress(OSError):
                        os.unlink(self.path)
                    return None
                if key.fileobj is self.listener:
                    request = self._accept()
                    if request is not None:
                        return request
                else:
                    self._reap(key.fd)

    def _accept(self) -> dict[str, Any] | None:
        connection, _ = self.listener.accept()
        connection.settimeout(5)
        fds: list[int] = []
        parent = os.getpid()
        try:
            frame, fds, _, _ = socket.recv_fds(connection, FRAME_BYTES_MAX, 1)
            if not frame:
                raise ValueError("empty frame")
            if len(fds) != 1:
                raise ValueError("one fd for the log is wanted")
            request = checked(frame)
            pid = os.fork()
        except (OSError, ValueError, KeyError, TypeError) as error:
            with connection, contextlib.suppress(OSError):
                connection.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            for fd in fds:
                os.close(fd)
            return None
        if pid == 0:
            self._close_inherited(connection)
            become_child(request, fds[0], parent)
            return request
        os.close(fds[0])
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = pid, connection
        self.poll.register(pidfd, selectors.EVENT_READ)
        with contextlib.suppress(OSError):
            socket.send_fds(connection, [json.dumps({"pid": pid}).encode()], [pidfd])
        return None

    def _close_inherited(self, connection: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        self.poll.close()
        for fd in (*self.children, self.wake, self.wake_write):
            os.close(fd)
        for s in (self.listener, connection, *(c for _, c in self.children.values())):
            s.close()

    def _reap(self, pidfd: int) -> None:
        pid, connection = self.children.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        status = os.waitpid(pid, 0)[1]
        with connection, contextlib.suppress(OSError):  # whoever asked for it may be gone
            connection.send(json.dumps({"status": status}).encode())


def main() -> int:
    parser = argparse.ArgumentParser(prog="nitsum_sglang.zygote", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("socket", nargs="?", default="")
    parser.add_argument("--parent", type=int, required=True, help="pid with which this process shall die")
    parser.add_argument("--preload", default="", help="modules, separated by commas")
    parser.add_argument("--once", action="store_true", help="run one request from stdin in this process")
    args = parser.parse_args()
    die_with_parent(args.parent)
    gc.disable()  # import makes no garbage worth the walk
    if not args.once:
        preload([name for name in args.preload.split(",") if name])
        if problem := self_check():
            print(f"zygote: {problem}", file=sys.stderr, flush=True)
            return SELF_CHECK_FAILED
        gc.collect()
        gc.freeze()  # the collector no longer writes to the imported heap, so its pages stay shared
        gc.enable()
        request = Zygote(args.socket).serve()
    else:
        gc.enable()
        request = checked(sys.stdin.buffer.read(FRAME_BYTES_MAX))
        os.environ.update(request["env"])
    if request is None:
        return 0
    return call(request)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a child must not run the zygote's exit handlers
