"""In an engine: binds parameters to the store's file, read-only. SGLang's weight-cache client asks for the transport by name."""

import ctypes
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

NAME = "nitsum_pages"
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_FAILED = ctypes.c_void_p(-1).value


def register() -> None:
    """The transport becomes known to SGLang in this process and in those that it forks or spawns with our plugin."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.weight_cache.ipc_loader.get_client_transport_backend", _backend, HookType.AROUND)


def _backend(original: Callable[[Any], Any], name: Any) -> Any:
    return Pages() if name == NAME else original(name)


class Pages:
    """SGLang's transport interface. Mappings live as long as the process: parameters point into them."""

    name = NAME

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def recv_fetch_state_response(self, sock: Any, result: Any) -> Any:
        return result

    def import_tensor(self, entry: dict[str, Any]) -> Any:
        """The tensor of one entry (`plan.Entry` as a dict, with the file's path and the dtype's name)."""
        import torch

        fd = self.files.get(entry["path"])
        if fd is None:
            fd = self.files[entry["path"]] = os.open(entry["path"], os.O_RDONLY | os.O_CLOEXEC)
        dtype = getattr(torch, entry["dtype"])
        size = sum(length for _, length in entry["segments"])
        buffer = _mapped(fd, entry["segments"]) if entry["mapped"] else _copied(fd, entry["segments"])
        flat = torch.frombuffer(buffer, dtype=dtype, count=size // entry["item_bytes"])
        if math.prod(entry["shape"]) == 0:
            return flat.new_empty(entry["shape"])
        return flat.as_strided(entry["shape"], entry["stride"], entry["offset"])


def _copied(fd: int, segments: list[tuple[int, int]]) -> bytearray:
    out = bytearray()
    for start, length in segments:
        part = os.pread(fd, length, start)
        if len(part) != length:
            raise OSError(f"the weight store's file ends early: {len(part)} of {length} bytes at {start}")
        out += part
    return out


def _mapped(fd: int, segments: list[tuple[int, int]]) -> Any:
    """The segments back to back in one range of addresses: reserved first, then each mapped over its part of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    size = sum(-(-length // mmap.PAGESIZE) * mmap.PAGESIZE for _, length in segments)
    base = libc.mmap(None, size, 0, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if base in (None, _FAILED):
        raise OSError(ctypes.get_errno(), "mmap: no addresses for the weights")
    place = base
    for start, length in segments:
        got = libc.mmap(place, length, mmap.PROT_READ, _MAP_SHARED | _MAP_FIXED, fd, start)
        if got != place:
            raise OSError(ctypes.get_errno(), "mmap: the weight store's file cannot be mapped")
        place += length
    return (ctypes.c_char * size).from_address(base)
