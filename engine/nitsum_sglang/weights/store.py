"""The weight store: one small process per node and model that owns the weights' file and tells engines where their slices lie.

usage: python -m nitsum_sglang.weights.store --model DIR --socket S --memory-dir D [--dtype float32] [--zygote S] [--die-with-parent]
Prints one line of JSON when ready: {"bytes": N, "seconds": T, "reused": false, "private_bytes": {"2": N, ...}} (most of any rank, by TP).
Requests on the socket: SGLang's `fetch_state`, and {"type": "private_bytes", "tp_size": N, "tp_rank": R}.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nitsum.errors import UnsupportedModel

from . import transport, wire
from .memory import Busy, WeightFile

CLIENTS_MAX = 16
"""Served at once; more wait in the socket's backlog."""
BACKLOG = 128
CLIENT_TIMEOUT_S = 20.0
REPORTED_TP_MAX = 16

log = logging.getLogger(__name__)


class Stopped(Exception):
    """SIGTERM or SIGINT."""


def answer(weights: WeightFile, request: Any) -> dict[str, Any]:
    """The reply to one request; whatever is wrong with it is said in `message`."""
    try:
        kind = request["type"]
        if kind == "private_bytes":
            return {"status": "ok", "private_bytes": weights.plan.private_bytes(int(request["tp_size"]), int(request["tp_rank"]))}
        if kind != "fetch_state":
            return {"status": "error", "message": f"unknown request {kind!r}"}
        config = request["config"]
        if problem := mismatch(weights, config):
            return {"status": "error", "message": problem, "daemon_config": {"refused": problem}}
        entries = weights.entries(int(config["tp_size"]), int(config["tp_rank"]))
    except (UnsupportedModel, AssertionError, KeyError, TypeError, ValueError) as e:
        return {"status": "error", "message": repr(e), "daemon_config": {"refused": repr(e)}}
    return {
        "status": "ok",
        "config": config,
        "entries": entries,
        "pid": os.getpid(),
        "transport_backend": transport.NAME,
        "preloaded_weights_bytes": 0,
    }


def mismatch(weights: WeightFile, config: dict[str, Any]) -> str:
    """Why an engine cannot run on these weights; empty if it can."""
    if os.path.realpath(config["model_path"]) != os.path.realpath(weights.model):
        return f"this store holds {weights.model}, the engine wants {config['model_path']}"
    dtype = str(config["dtype"]).removeprefix("torch.")
    if dtype != weights.dtype:
        return f"this store holds {weights.dtype}, the engine runs {dtype}: start both with the same dtype"
    if config.get("quant_method"):
        return "an engine that quantises cannot share weights: start it without"
    split = {k: config.get(k, 1) for k in ("pp_size", "ep_size", "attn_dp_size", "attn_cp_size") if (config.get(k) or 1) != 1}
    return f"only tensor parallelism shares weights; the engine has {split}" if split else ""


def listen(path: str) -> socket.socket:
    """A 0600 socket in a folder that is ours alone."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    info = os.stat(folder)
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise PermissionError(f"{folder} must be owned by this user with mode 0700")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX)
    old = os.umask(0o177)
    try:
        listening.bind(path)
    finally:
        os.umask(old)
    listening.listen(BACKLOG)
    return listening


def serve(listening: socket.socket, weights: WeightFile) -> None:
    """Until a signal ends it."""
    free = threading.BoundedSemaphore(CLIENTS_MAX)

    def one(connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(CLIENT_TIMEOUT_S)
                wire.send(connection, answer(weights, wire.receive(connection)))
        except (OSError, ValueError, pickle.UnpicklingError, EOFError) as e:
            log.warning("a client was turned away: %s", e)
        finally:
            free.release()

    while True:
        free.acquire()
        connection, _ = listening.accept()
        threading.Thread(target=one, args=(connection,), daemon=True).start()


def ready_line(weights: WeightFile, seconds: float) -> str:
    private = {tp: max(weights.plan.private_bytes(tp, rank) for rank in range(tp)) for tp in weights.facts.legal_tp(REPORTED_TP_MAX)}
    return json.dumps({"bytes": weights.plan.size, "seconds": round(seconds, 3), "reused": weights.reused, "private_bytes": private})


def _stop(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Stopped


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="nitsum_sglang.weights.store", description="Holds one model's weights for every engine of a node."
    )
    parser.add_argument("--model", required=True, help="checkpoint folder: config.json and *.safetensors")
    parser.add_argument("--socket", required=True, help="Unix socket to answer on; its folder must have mode 0700")
    parser.add_argument("--memory-dir", required=True, type=Path, help="folder on a tmpfs for the weights' file")
    parser.add_argument("--dtype", default="", help="dtype that engines run; default: the checkpoint's")
    parser.add_argument("--zygote", default="", help="socket of a zygote for CPU, to compute the rotary embedding; default: a new process")
    parser.add_argument("--die-with-parent", action="store_true", help="end, and remove the file, when the parent process ends")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    if args.die_with_parent:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            return 1
    weights: WeightFile | None = None
    listening: socket.socket | None = None
    try:
        started = time.monotonic()
        weights = WeightFile(args.model, args.memory_dir, args.dtype, args.zygote)
        weights.fill()
        listening = listen(args.socket)
        print(ready_line(weights, time.monotonic() - started), flush=True)
        serve(listening, weights)
    except Stopped:
        return 0
    except (UnsupportedModel, Busy, OSError) as e:
        log.error("%s", e)
        return 1
    finally:
        if listening is not None:
            listening.close()
            Path(args.socket).unlink(missing_ok=True)
        if weights is not None:
            weights.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
