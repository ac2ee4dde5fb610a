"""Fills the store's file from a checkpoint: streaming, a few MiB at a time, converted to the dtype that engines run."""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nitsum.errors import UnsupportedModel

CHUNK_BYTES = 8 << 20
SOURCES: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Source:
    """A tensor in a safetensors file: byte offset and size there."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def sources(model: str) -> dict[str, Source]:
    """Every tensor of the checkpoint, from one file or all shards. Raises UnsupportedModel for a dtype that is not a plain float."""
    found: dict[str, Source] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
        for name, t in header.items():
            if name == "__metadata__":
                continue
            if t["dtype"] not in SOURCES:
                raise UnsupportedModel(f"{name} is {t['dtype']}; only {', '.join(SOURCES)} can be shared")
            first, last = t["data_offsets"]
            found[name] = Source(path, t["dtype"], tuple(t["shape"]), 8 + size + first, last - first)
    return found


def write(fd: int, offset: int, source: Source, dtype: str) -> None:
    """Copies one tensor to `offset` of `fd`."""
    for part in _chunks(source):
        data = memoryview(_converted(part, source.dtype, dtype)).cast("B")
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written


def _chunks(source: Source) -> Iterator[Any]:
    with source.path.open("rb") as f:
        f.seek(source.offset)
        left = source.size
        while left:
            data = f.read(min(left, CHUNK_BYTES))
            if not data:
                raise UnsupportedModel(f"{source.path} ends early; the file is damaged")
            left -= len(data)
            yield np.frombuffer(data, SOURCES[source.dtype])


def _converted(values: Any, source: str, dtype: str) -> Any:
    if (source, dtype) in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
        return values
    wide = (values.astype(np.uint32) << 16).view(np.float32) if source == "BF16" else values.astype(np.float32)
    if dtype == "float32":
        return wide
    if dtype == "float16":
        return wide.astype(np.float16)
    bits = wide.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
