"""How long the engine's steps take, told to the host about once a second: what the operator corrects the step-time profile by.

A step's time runs from its launch to the end of its results, CPU work included, as streams feel it. Steps alike in kind, batch, chunk and
context (each to a power of two) count as one; a message has the means of the commonest of them.
"""

import json
import time
from typing import Any

from nitsum_sglang import seam

WINDOW_S = 1.0
KINDS_MAX = 16
"""In one message; the commonest."""
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."


class Window:
    """Sums of [count, batch, tokens, context, ms] by kind."""

    def __init__(self) -> None:
        self.began = 0.0
        self.sums: dict[tuple[str, int, int, int], list[float]] = {}

    def add(self, phase: str, batch: int, tokens: int, context: float, ms: float) -> None:
        key = phase, batch.bit_length(), tokens.bit_length(), int(context).bit_length()
        row = self.sums.setdefault(key, [0.0] * 5)
        for i, value in enumerate((1, batch, tokens, context, ms)):
            row[i] += value

    def message(self) -> str:
        """JSON: [[phase, batch, tokens, context, mean_ms, count], ...]"""
        most = sorted(self.sums.items(), key=lambda kv: -kv[1][0])[:KINDS_MAX]
        return json.dumps([[key[0], *(round(x / row[0], 3) for x in row[1:]), int(row[0])] for key, row in most])


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SCHEDULER + "process_batch_result", _ended, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "pause_generation", _parked, HookType.AROUND)


def _ended(original: Any, self: Any, batch: Any, result: Any) -> Any:
    step = _described(batch)  # before its results change it
    answer = original(self, batch, result)
    began, now = batch.launch_ts, time.monotonic()
    if step is None or self.ipc_channels.send_to_tokenizer.socket is None:  # ranks that answer nobody
        return answer
    window = _window(self)
    if not window.sums:
        window.began = began
    window.add(*step, (now - began) * 1e3)
    if now - window.began >= WINDOW_S:
        _tell(self, window.message())
        self.nitsum_window = Window()
    return answer


def _parked(original: Any, self: Any, request: Any) -> Any:
    """What is left of a window may be of a warm-up."""
    self.nitsum_window = Window()
    return original(self, request)


def _window(scheduler: Any) -> Window:
    if (window := getattr(scheduler, "nitsum_window", None)) is None:
        window = scheduler.nitsum_window = Window()
    return window


def _described(batch: Any) -> tuple[str, int, int, float] | None:
    """(phase, decodes, prefill tokens, mean context of the decodes; of a pure prefill, of what was cached). None: no such step."""
    if batch.forward_mode.is_decode():
        lengths = batch.seq_lens_cpu
        return ("decode", len(lengths), 0, float(lengths.sum()) / max(len(lengths), 1)) if lengths is not None else None
    if not batch.forward_mode.is_extend() or not batch.extend_lens or not batch.prefix_lens:
        return None
    decodes = len(batch.decoding_reqs or ()) if batch.forward_mode.is_mixed() else 0
    before = [int(n) for n in batch.prefix_lens]
    own = before[-decodes:] if decodes else before
    return "mixed" if decodes else "prefill", decodes, sum(map(int, batch.extend_lens)) - decodes, sum(own) / len(own)


def _tell(scheduler: Any, message: str) -> None:
    from sglang.srt.managers.io_struct import FlushCacheReqOutput

    scheduler.send_control_output(FlushCacheReqOutput(rid=seam.STEPS, success=True, message=message), None)
