"""What we add to SGLang through its own plugin seam (entry point `sglang.srt.plugins`), applied in the engine's processes only.

The platform plugin (entry point `sglang.srt.platforms`) is in `cpu_platform`. SGLang logs and swallows what a plugin raises, so the
leader asks `loaded()` afterwards.
"""

import importlib
import os

_loaded: list[str] = []


def register() -> None:
    """Called by SGLang's `load_plugins`. An ordinary `sglang` process gets at most the CPU's seeds: nothing of ours changes it."""
    if os.environ.get("NITSUM_CPU_NATIVE") == "1":
        from . import cpu_seed

        cpu_seed.register()
        _loaded.append("cpu_seed")
    if not os.environ.get("NITSUM_ENGINE_ID"):
        return
    from . import awake_log, exact_resume, governor, step_times

    exact_resume.register()
    awake_log.register()
    governor.register()
    step_times.register()
    _loaded.extend(("exact_resume", "awake_log", "governor", "step_times"))
    if os.environ.get("NITSUM_WEIGHT_STORE") == "1":
        importlib.import_module("nitsum_sglang.weights.transport").register()
        _loaded.append("weights")


def loaded() -> frozenset[str]:
    return frozenset(_loaded)
