"""The store's file: made once, reused when whole and of the same checkpoint, gone with the store."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nitsum.errors import UnsupportedModel
from nitsum_sglang import checkpoint

from .fill import ITEM_BYTES, sources, write
from .plan import ROPE, Plan, make_plan

ROPE_TIMEOUT_S = 240.0
ROPE_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "NITSUM_CPU_NATIVE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_USE_CPU_ENGINE": "0",
    "SGLANG_PLUGINS": "nitsum_cpu",
}
"""As an engine on CPU: SGLang chooses kernels, and the cache's dtype, when it is imported."""


class Busy(Exception):
    """Another store owns this model's file in this folder."""


class WeightFile:
    """`path` holds the tensors as `plan` says; `dtypes` names those that differ from `dtype` (the cos/sin cache on a GPU)."""

    def __init__(self, model: str, folder: Path, dtype: str = "") -> None:
        self.dtype = checkpoint.served_dtype(model, dtype)
        self.facts = checkpoint.read_facts(model, os.path.basename(os.path.normpath(model)), self.dtype)
        self.model, self.sources = model, sources(model)
        self.key = f"{checkpoint.revision(model)}-{self.dtype}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path, self.marker = folder / f"{self.key}.weights", folder / f"{self.key}.complete"
        self.lock = os.open(folder / f"{self.key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise Busy(f"another weight store holds {self.path}; stop it or choose another --memory-dir") from None
        self.dtypes: dict[str, str] = {}
        self.plan: Plan
        self.reused = False

    def fill(self) -> None:
        """Returns when the file is whole. An interrupted fill leaves no marker, so the next one starts over."""
        stamp = self._stamp()
        with contextlib.suppress(OSError, ValueError, KeyError):
            marker = json.loads(self.marker.read_text())
            self._plan(marker["rope"])
            if marker["stamp"] == stamp and self.path.stat().st_size == self.plan.size:
                self.reused = True
                return
        self.marker.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        rope_path = self.path.with_suffix(".rope")
        command = [
            sys.executable,
            "-m",
            "nitsum_sglang.weights.rope",
            "--model",
            self.model,
            "--dtype",
            self.dtype,
            "--out",
            str(rope_path),
        ]
        environment = os.environ | ROPE_ENVIRONMENT
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as computing:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    self._plan(None)
                    os.ftruncate(fd, self.plan.size)
                    for name, place in self.plan.stored.items():
                        write(fd, place.offset, self.sources[name], self.dtype)
                    rope = self._rope(computing, rope_path, fd)
                finally:
                    os.close(fd)
            finally:
                computing.kill()
                rope_path.unlink(missing_ok=True)
        self.marker.write_text(json.dumps({"stamp": stamp, "rope": rope}))

    def _rope(self, computing: "subprocess.Popen[bytes]", path: Path, fd: int) -> dict[str, Any]:
        out, _ = computing.communicate(timeout=ROPE_TIMEOUT_S)
        if computing.returncode != 0:
            raise UnsupportedModel(f"SGLang cannot compute the rotary embedding of {self.model}; its message is above")
        rope: dict[str, Any] = json.loads(out.splitlines()[-1])
        self._plan(rope)
        os.ftruncate(fd, self.plan.size)
        os.pwrite(fd, path.read_bytes(), self.plan.stored[ROPE].offset)
        return rope

    def _plan(self, rope: dict[str, Any] | None) -> None:
        shapes = {name: s.shape for name, s in self.sources.items()}
        cache = (tuple(rope["shape"]), ITEM_BYTES[rope["dtype"]]) if rope else None
        self.plan = make_plan(self.facts, shapes, ITEM_BYTES[self.dtype], cache)
        self.dtypes = {ROPE: rope["dtype"]} if rope else {}

    def _stamp(self) -> list[Any]:
        """Which files, when written: a checkpoint trained further keeps its headers."""
        files = sorted({s.path for s in self.sources.values()})
        return [str(self.plan_version), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]

    plan_version = 1
    """Raise it when the order of the file changes."""

    def entries(self, tp_size: int, rank: int) -> dict[str, dict[str, Any]]:
        """As SGLang's client and our transport read them."""
        return {
            e.name: {
                "path": str(self.path),
                "segments": list(e.segments),
                "mapped": e.mapped,
                "shape": list(e.shape),
                "stride": list(e.stride),
                "offset": e.offset,
                "item_bytes": e.item_bytes,
                "dtype": self.dtypes.get(e.name, self.dtype),
                "is_param": e.is_param,
            }
            for e in self.plan.entries(tp_size, rank)
        }

    def close(self) -> None:
        """Removes the file; engines that mapped it keep their pages until they end."""
        for path in (self.marker, self.path, self.path.with_suffix(".rope")):
            path.unlink(missing_ok=True)
        os.close(self.lock)
