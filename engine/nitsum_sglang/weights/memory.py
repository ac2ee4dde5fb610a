"""The store's file: made once, reused when whole and of the same checkpoint, gone with the store."""

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nitsum.errors import UnsupportedModel
from nitsum_sglang import checkpoint
from nitsum_sglang.zygote_client import run_to_end

from .fill import ITEM_BYTES, sources, write
from .plan import ROPE, Plan, make_plan

log = logging.getLogger(__name__)
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

    def __init__(self, model: str, folder: Path, dtype: str = "", zygote: str = "") -> None:
        """`zygote`: socket of one for CPU, which computes what SGLang must in a fraction of the time that importing SGLang takes."""
        self.zygote = zygote
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
        try:
            with self._computing(rope_path) as ended:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    self._plan(None)
                    os.ftruncate(fd, self.plan.size)
                    for name, place in self.plan.stored.items():
                        write(fd, place.offset, self.sources[name], self.dtype)
                    ended()
                    rope: dict[str, Any] = json.loads(Path(f"{rope_path}.json").read_text())
                    self._plan(rope)
                    os.ftruncate(fd, self.plan.size)
                    os.pwrite(fd, rope_path.read_bytes(), self.plan.stored[ROPE].offset)
                finally:
                    os.close(fd)
        finally:
            self._remove_rope()
        self.marker.write_text(json.dumps({"stamp": stamp, "rope": rope}))

    @contextlib.contextmanager
    def _computing(self, out: Path) -> Iterator[Callable[[], None]]:
        """Computes the rotary embedding into `out` meanwhile. Calling what it yields waits for it, or raises UnsupportedModel."""
        args = {"model": self.model, "dtype": self.dtype, "out": str(out)}
        failed = UnsupportedModel(f"SGLang cannot compute the rotary embedding of {self.model}; its message is above, or in weights.log")
        if self.zygote:
            try:
                status = run_to_end(self.zygote, "nitsum_sglang.weights.rope:run", args, ROPE_TIMEOUT_S)
            except (OSError, ValueError) as e:
                log.warning("the zygote does not compute the rotary embedding, a new process does: %s", e)
            else:
                if status:
                    raise failed
                yield lambda: None
                return
        command = [sys.executable, "-m", "nitsum_sglang.weights.rope", *(word for k, v in args.items() for word in (f"--{k}", v))]
        with subprocess.Popen(command, env=os.environ | ROPE_ENVIRONMENT, stdout=sys.stderr) as process:

            def ended() -> None:
                if process.wait(ROPE_TIMEOUT_S):
                    raise failed

            try:
                yield ended
            finally:
                process.kill()

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
        self._remove_rope()
        for path in (self.marker, self.path):
            path.unlink(missing_ok=True)
        os.close(self.lock)

    def _remove_rope(self) -> None:
        for suffix in (".rope", ".rope.json"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)
