"""--enable-deterministic-inference on CPU, for seeded tests: stock refuses torch_native there and wants GPU kernels."""

from typing import Any

MASK = 0xFFFFFFFF


def register() -> None:
    from sglang.srt import server_args
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in ("DETERMINISTIC_ATTENTION_BACKEND_CHOICES", "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND"):
        choices = getattr(server_args, name)
        if "torch_native" not in choices:
            choices.append("torch_native")
    runner = "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode"
    HookRegistry.register(runner, lambda original, self: None, HookType.AROUND)
    HookRegistry.register("sglang.srt.layers.sampler.murmur_hash32", _murmur32, HookType.AROUND)


def _rotate(x: Any, bits: int) -> Any:
    return ((x << bits) | (x >> (32 - bits))) & MASK


def _mix(h: Any, k: Any) -> Any:
    k = _rotate((k * 0xCC9E2D51) & MASK, 15) * 0x1B873593 & MASK
    return (_rotate(h ^ k, 13) * 5 + 0xE6546B64) & MASK


def _murmur32(original: Any, seed: Any, positions: Any, col_indices: Any) -> Any:
    """sglang.kernels.ops.sampling.murmur_hash in plain torch: the stock CPU branch needs sgl_kernel."""
    import torch

    s = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    h = torch.zeros_like(s)
    for k in (s & MASK, (s >> 32) & MASK, positions.to(torch.int64) & MASK):
        h = _mix(h, k)
    h = _mix(h[:, None], col_indices.to(torch.int64)[None, :] & MASK) ^ 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)
