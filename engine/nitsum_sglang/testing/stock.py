"""A stock SGLang server as the reference: no plugin of ours but the CPU platform's, no store, overlap schedule off."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from nitsum_sglang.testing.ports import free_ports
from nitsum_sglang.zygote import die_with_parent
from nitsum_sglang.zygote_client import unserved_modules


@contextlib.contextmanager
def stock_server(model: Path, folder: Path, tp_size: int = 1, extra: tuple[str, ...] = (), timeout_s: float = 300) -> Iterator[str]:
    """Yields its URL. Takes about half a minute to start on two idle cores."""
    with stock_starting(model, folder, tp_size, extra) as ready:
        yield ready(timeout_s)


@contextlib.contextmanager
def stock_starting(model: Path, folder: Path, tp_size: int = 1, extra: tuple[str, ...] = ()) -> Iterator[Callable[[float], str]]:
    """For who has something else to do meanwhile: what it yields waits for that many seconds at most, and returns the URL."""
    port = free_ports(1)[0]
    env = {
        **os.environ,
        "SGLANG_PLUGINS": "nitsum_cpu",
        "SGLANG_DISABLED_MODEL_ARCHS": unserved_modules(),
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(i % (os.cpu_count() or 1)) for i in range(tp_size)),
        "SGLANG_USE_CPU_ENGINE": "0",
        "NITSUM_CPU_NATIVE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TMPDIR": str(folder),
    }
    flags = (
        f"--model-path {model} --device cpu --tp-size {tp_size} --host 127.0.0.1 --port {port} --mem-fraction-static 0.2 "
        "--max-total-tokens 8192 --page-size 16 --disable-overlap-schedule --attention-backend torch_native --sampling-backend pytorch "
        "--dtype float32 --sleep-on-idle --skip-server-warmup --log-level warning"
    ).split()
    with (folder / "stock.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *flags, *extra],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # One that is killed leaves no server behind, whose work would spoil all that is measured later.
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        try:
            yield functools.partial(_wait, f"http://127.0.0.1:{port}", process, folder / "stock.log")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the stock server ended:\n{log.read_text()[-3000:]}"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return url
        time.sleep(0.3)
    raise AssertionError(f"the stock server is not ready after {timeout_s:g} s:\n{log.read_text()[-3000:]}")
