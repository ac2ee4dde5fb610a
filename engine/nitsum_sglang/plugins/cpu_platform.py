"""SGLang on a machine without GPU kernels: plain torch on CPU, opt-in by NITSUM_CPU_NATIVE=1. For tests, CI and the demo."""

import os
from typing import Any


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform's class by name, or None where it does not apply."""
    return "nitsum_sglang.plugins.cpu_platform:CpuNativePlatform" if os.environ.get("NITSUM_CPU_NATIVE") == "1" else None


def _platform() -> type:
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

    class CpuNativePlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
        _enum = PlatformEnum.OOT
        device_name = "cpu"
        device_type = "cpu"
        capabilities = PlatformCapabilities()  # no Triton, no graphs

        def is_pin_memory_available(self, device: Any = None) -> bool:
            return False

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def get_compile_backend(self, mode: str | None = None) -> str:
            return "eager"  # else the first request at TP > 1 compiles C++ for a quarter of a minute

        def support_cuda_graph(self) -> bool:
            return False

        def init_backend(self) -> None:
            pass

    return CpuNativePlatform


def __getattr__(name: str) -> Any:
    if name != "CpuNativePlatform":
        raise AttributeError(name)
    globals()[name] = _platform()
    return globals()[name]
