"""Wake and park inside the scheduler: starts parked, says when it changed, sleeps while parked, keeps its own log of both.

Stock pause and continue give no reply, and a paused stock scheduler spins. The reply is a FlushCacheReqOutput that carries the
command's rid, which stock never does. `awake.jsonl` is what proves that no two engines were awake on one GPU; where an engine ended
while it was awake, the host closes the interval once no process of it is left.
"""

import json
import os
import time
from typing import Any

from nitsum.faults import FaultPoint

from . import fault

BYTES_MAX = 1 << 20
"""Of the log; the one before it is kept as `awake.jsonl.1`."""
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SCHEDULER + "run_event_loop", _start_parked, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "pause_generation", _park, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "continue_generation", _wake, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "_record_scheduler_state_for_paused_engine", _sleep_while_parked, HookType.AROUND)


def _start_parked(original: Any, self: Any) -> Any:
    self._engine_paused = True
    return original(self)


def _park(original: Any, self: Any, request: Any) -> Any:
    was_awake = not self._engine_paused
    original(self, request)
    if was_awake:
        _append("park")
    _confirm(self, request, "parked")


def _wake(original: Any, self: Any, request: Any) -> Any:
    was_parked = self._engine_paused
    fault.visit(FaultPoint.ENGINE_WAKING)
    if was_parked:
        _append("wake")  # before the first step: the interval on record is never shorter than the real one
    original(self, request)
    _confirm(self, request, "awake")


def _sleep_while_parked(original: Any, self: Any) -> Any:
    original(self)
    if self.idle_sleeper is not None:  # rank 0; the others wait for its broadcast
        self.idle_sleeper.maybe_sleep()


def _confirm(scheduler: Any, request: Any, state: str) -> None:
    from sglang.srt.managers.io_struct import FlushCacheReqOutput

    if request.rid:
        scheduler.send_control_output(FlushCacheReqOutput(rid=request.rid, success=True, message=state), request)


def _append(event: str) -> None:
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_rank != 0:
        return
    line = {
        "t": time.clock_gettime(time.CLOCK_MONOTONIC),
        "event": event,
        "engine": os.environ["NITSUM_ENGINE_ID"],
        "gpus": json.loads(os.environ["NITSUM_GPUS"]),
        "rank": 0,
        "pid": os.getpid(),
    }
    path = os.path.join(os.environ["NITSUM_STATE_DIR"], "awake.jsonl")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if os.fstat(fd).st_size > BYTES_MAX:
        os.close(fd)
        os.replace(path, path + ".1")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, (json.dumps(line) + "\n").encode())
    finally:
        os.close(fd)
