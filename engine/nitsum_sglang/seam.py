"""Names that the host and the engine's leader share: sockets, frames. Imports nothing of SGLang."""

import os
from pathlib import Path

SUBMIT, ABORT, ABORT_ALL, PAUSE, CONTINUE, FLUSH, GOVERN = b"submit", b"abort", b"abort-all", b"pause", b"continue", b"flush", b"govern"
"""First part of a frame. Then: submit: rid, priority, Submit bytes. abort: rid. pause, continue: rid of the confirmation.
govern: prefill tokens per step."""
STEPS = "steps."
"""Rid of the reply that carries step times (`plugins/step_times.py`)."""

SOCKETS = ("input", "tokens", "replies", "rpc", "metrics", "leader")
SOCKET_NAME_BYTES_MAX = 107


def addresses(state_dir: str) -> dict[str, str]:
    """ZMQ addresses by name. Raises ValueError when the folder's name is too long for a Unix socket."""
    if len(os.fsencode(state_dir)) > SOCKET_NAME_BYTES_MAX - 10:
        raise ValueError(
            f"state_dir: {state_dir} is longer than the {SOCKET_NAME_BYTES_MAX - 10} bytes that leave room for a socket's name"
        )
    return {name: f"ipc://{Path(state_dir, name[:8])}" for name in SOCKETS}
