"""The cos/sin cache, computed by SGLang's own code as its models call it. A process of its own: the store itself stays small.

usage: python -m nitsum_sglang.weights.rope --model DIR --dtype D --out FILE      or `run` as the target of a zygote, which has SGLang
Writes the bytes to FILE and {"shape": [...], "dtype": D} to FILE.json.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def rope_parameters(config: Any) -> tuple[int, Any]:
    """(theta, scaling) as SGLang's Llama reads them; its Qwen models read the same fields."""
    scaling: Any
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:
        theta = parameters.get("rope_theta", 10000)
        scaling = dict(parameters)
    else:
        theta, scaling = getattr(config, "rope_theta", 10000), getattr(config, "rope_scaling", None)
    if scaling is not None and getattr(config, "original_max_position_embeddings", None):
        scaling["original_max_position_embeddings"] = config.original_max_position_embeddings
    return theta, scaling


def run(args: dict[str, str]) -> None:
    """`args`: model, dtype, out."""
    import torch
    from sglang.srt.layers.rotary_embedding import get_rope
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args["model"], local_files_only=True)
    theta, scaling = rope_parameters(config)
    torch.set_default_dtype(getattr(torch, args["dtype"]))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = get_rope(
        head_dim,
        rotary_dim=int(getattr(config, "partial_rotary_factor", 1) * head_dim),
        max_position=config.max_position_embeddings,
        base=theta,
        rope_scaling=scaling,
        is_neox_style=getattr(config, "rope_is_neox_style", True),
    )
    cache = rope.cos_sin_cache.contiguous()
    Path(args["out"]).write_bytes(cache.view(torch.uint8).numpy().tobytes())
    shape = {"shape": list(cache.shape), "dtype": str(cache.dtype).removeprefix("torch.")}
    Path(args["out"] + ".json").write_text(json.dumps(shape))


def main() -> None:
    parser = argparse.ArgumentParser(prog="nitsum_sglang.weights.rope")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--out", required=True)
    run(vars(parser.parse_args()))
    os._exit(0)  # SGLang's imports leave threads that make an ordinary exit slow


if __name__ == "__main__":
    main()
