"""What a checkpoint folder says about its model: facts for planning, and an identity for caches. Reads JSON and headers, no tensors."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nitsum.errors import UnsupportedModel
from nitsum.model import ModelFacts

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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


def read_facts(path: str, name: str) -> ModelFacts:
    """Raises UnsupportedModel: unknown architecture, quantised weights, missing files or fields."""
    c = config(path)
    architecture = (c.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(f"{architecture} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if c.get("quantization_config"):
        raise UnsupportedModel("quantised weights cannot be shared between TP layouts; use an unquantised checkpoint")
    try:
        heads, hidden = int(c["num_attention_heads"]), int(c["hidden_size"])
        weights = sum(size - len(header) - 8 for _, header, size in _headers(path))
        return ModelFacts(
            name=name,
            num_layers=int(c["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=int(c.get("head_dim") or hidden // heads),
            hidden_size=hidden,
            intermediate_size=int(c["intermediate_size"]),
            vocab_size=int(c["vocab_size"]),
            dtype_bytes=DTYPE_BYTES.get(str(c.get("dtype") or c.get("torch_dtype") or "bfloat16"), 2),
            tied_embeddings=bool(c.get("tie_word_embeddings", False)),
            context_length=int(c["max_position_embeddings"]),
            weight_bytes=weights,
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
