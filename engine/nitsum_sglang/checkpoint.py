"""What a checkpoint folder says about its model: facts for planning, and an identity for caches. Reads JSON and headers, no tensors."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nitsum.errors import UnsupportedModel
from nitsum.model import ModelFacts

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""Those that are served, each with its module in `sglang.srt.models`."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_AS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HEADER_BYTES_MAX = 100 << 20


def config(path: str) -> dict[str, Any]:
    """config.json. Raises UnsupportedModel that says what is missing."""
    file = Path(path, "config.json")
    try:
        read = json.loads(file.read_text())
    except OSError as e:
        raise UnsupportedModel(f"{file}: {e.strerror}; a checkpoint is a folder with config.json and *.safetensors") from e
    except ValueError as e:
        raise UnsupportedModel(f"{file}: not JSON: {e}") from e
    if not isinstance(read, dict):
        raise UnsupportedModel(f"{file}: not a JSON object")
    return read


def _headers(path: str) -> list[tuple[str, bytes, int]]:
    """(file name, safetensors header, file size) of each shard."""
    found = []
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            if size > HEADER_BYTES_MAX:
                raise UnsupportedModel(f"{file}: its header claims {size} bytes; the file is damaged")
            found.append((file.name, f.read(size), file.stat().st_size))
    if not found:
        raise UnsupportedModel(f"{path}: no *.safetensors; other formats are not served")
    return found


def served_dtype(path: str, wanted: str = "") -> str:
    """What engines of this checkpoint run in: `wanted`, else what config.json says, else what most of its weights are.

    The store, the engines and the facts all ask here. Left to itself SGLang would serve float32 in float16, and what names no dtype too.
    """
    c = config(path)
    named = wanted or str(c.get("dtype") or c.get("torch_dtype") or _stored_dtype(path)).removeprefix("torch.")
    if named not in DTYPE_BYTES:
        raise UnsupportedModel(f"dtype {named}; supported are {', '.join(DTYPE_BYTES)}")
    return named


def _stored_dtype(path: str) -> str:
    sizes: dict[str, int] = {}
    for tensor in _tensors(path):
        sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    most = max(sizes, key=lambda d: sizes[d], default="")
    return STORED_AS.get(most, most)


def _tensors(path: str) -> Iterator[dict[str, Any]]:
    """What the headers say of each tensor: dtype, shape, data_offsets."""
    for _, header, _ in _headers(path):
        yield from (tensor for name, tensor in json.loads(header).items() if name != "__metadata__")


def read_facts(path: str, name: str, dtype: str = "") -> ModelFacts:
    """`dtype`: what engines run in, where that is not the checkpoint's.

    Raises UnsupportedModel: unknown architecture or dtype, quantised weights, missing files or fields.
    """
    c = config(path)
    architecture = (c.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(f"{architecture} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if c.get("quantization_config"):
        raise UnsupportedModel("quantised weights cannot be shared between TP layouts; use an unquantised checkpoint")
    try:
        heads, hidden = int(c["num_attention_heads"]), int(c["hidden_size"])
        item_bytes = DTYPE_BYTES[served_dtype(path, dtype)]
        return ModelFacts(
            name=name,
            num_layers=int(c["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=int(c.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            intermediate_size=int(c["intermediate_size"]),
            vocab_size=int(c["vocab_size"]),
            dtype_bytes=item_bytes,
            tied_embeddings=bool(c.get("tie_word_embeddings", False)),
            context_length=int(c["max_position_embeddings"]),
            weight_bytes=sum(math.prod(t["shape"]) for t in _tensors(path)) * item_bytes,
        )
    except KeyError as e:
        raise UnsupportedModel(f"config.json lacks {e}") from e


SAMPLES, SAMPLE_BYTES = 16, 64 << 10


def _samples(file: Path) -> Iterator[bytes]:
    """Evenly spaced blocks of the file's content, the last one included."""
    size = file.stat().st_size
    with file.open("rb") as f:
        for i in range(1, SAMPLES + 1):
            f.seek(max(size * i // SAMPLES - SAMPLE_BYTES, 0))
            yield f.read(SAMPLE_BYTES)


def revision(path: str) -> str:
    """Digest of config, headers, sizes and samples of the weights: two fine-tunes of one model differ, and share no KV."""
    digest = hashlib.sha256(json.dumps(config(path), sort_keys=True).encode())
    for name, header, size in _headers(path):
        digest.update(f"{name}:{size}:".encode() + header)
        for block in _samples(Path(path, name)):
            digest.update(block)
    return digest.hexdigest()[:24]
