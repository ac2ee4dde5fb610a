"""Model configs without network: those in the profile extra, our own few, or a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nitsum.errors import InvalidSpec
from nitsum.model import ModelFacts
from nitsum.perf.names import model_key

SAME_CHECKPOINT_SHAPE = (
    (
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B",
    ),
    (
        "meta-llama/Llama-3.1-70B-Instruct",
        "meta-llama/Llama-3.1-70B",
        "meta-llama/Llama-3.3-70B-Instruct",
        "meta-llama/Meta-Llama-3.1-70B-Instruct",
        "meta-llama/Meta-Llama-3.1-70B",
    ),
)
"""Names whose configs differ in nothing that costs time or memory."""


@dataclass(frozen=True)
class ModelConfig:
    """`facts` without weights: bytes are 0."""

    name: str
    aliases: tuple[str, ...]
    raw: dict[str, Any]
    facts: ModelFacts


def aliases(name: str) -> tuple[str, ...]:
    same = next((names for names in SAME_CHECKPOINT_SHAPE if model_key(name) in map(model_key, names)), ())
    return tuple(n for n in same if model_key(n) != model_key(name))


def _known(folders: list[Any]) -> dict[str, Callable[[], str]]:
    """Readers of configs by model_key, from ORG--NAME.json or ORG--NAME_config.json. Left out: those quantised by a second file."""
    found: dict[str, Callable[[], str]] = {}
    for folder in folders:
        files = {f.name: f for f in folder.iterdir() if f.name.endswith(".json")}
        for file_name, file in files.items():
            stem = file_name.removesuffix(".json").removesuffix("_config")
            if not stem.endswith("_hf_quant") and f"{stem}_hf_quant_config.json" not in files:
                found[model_key(stem.replace("--", "/", 1))] = file.read_text
    return found


def load(name: str, file: Path | None, shipped: list[Any]) -> ModelConfig:
    """`shipped`: folders of configs beside our own. Raises InvalidSpec."""
    if file:
        try:
            text = file.read_text()
        except OSError as e:
            raise InvalidSpec("--config", f"{file}: {e.strerror}") from e
    else:
        known = _known([resources.files("nitsum_cli") / "model_configs", *shipped])
        names = [n for n in (name, *aliases(name)) if model_key(n) in known]
        if not names:
            near = sorted(k for k in known if model_key(name).split("/")[-1].split("-")[0] in k)
            listed = ", ".join(near or sorted(known))
            raise InvalidSpec("--model", f"no config of {name!r} is here; give --config config.json, or one of: {listed}", "UnknownModel")
        text = known[model_key(names[0])]()
    try:
        raw = json.loads(text)
        return ModelConfig(name, aliases(name), raw, _facts(name, raw.get("text_config", raw)))
    except ValueError as e:
        raise InvalidSpec("--config", f"{file}: not JSON: {e}") from e
    except (KeyError, TypeError, AttributeError) as e:
        raise InvalidSpec("--config", f"{file or name}: lacks {e}; it is the model's Hugging Face config.json") from e


def _facts(name: str, c: dict[str, Any]) -> ModelFacts:
    heads, hidden = int(c["num_attention_heads"]), int(c["hidden_size"])
    return ModelFacts(
        name=name,
        num_layers=int(c["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(c.get("num_key_value_heads") or heads),
        head_dim=int(c.get("head_dim") or hidden // heads),
        hidden_size=hidden,
        intermediate_size=int(c.get("intermediate_size") or c["moe_intermediate_size"]),
        vocab_size=int(c["vocab_size"]),
        dtype_bytes=2,
        tied_embeddings=bool(c.get("tie_word_embeddings", False)),
        context_length=int(c["max_position_embeddings"]),
        weight_bytes=0,
    )
