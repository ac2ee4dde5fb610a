"""The plan's entries are the slices that SGLang's own loading gives each rank, for any heads, sizes and TP."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.errors import UnsupportedModel
from nitsum.model import ModelFacts
from nitsum_sglang import checkpoint
from nitsum_sglang.weights import fill
from nitsum_sglang.weights.plan import PAGE_BYTES, Plan, make_plan, padded_vocabulary

LAYER = "model.layers.0."


def shapes(f: ModelFacts, bias: bool) -> dict[str, tuple[int, ...]]:
    q, kv, h, m = f.num_heads * f.head_dim, f.num_kv_heads * f.head_dim, f.hidden_size, f.intermediate_size
    found = {"model.embed_tokens.weight": (f.vocab_size, h), "lm_head.weight": (f.vocab_size, h), "model.norm.weight": (h,)}
    found |= {LAYER + "input_layernorm.weight": (h,), LAYER + "post_attention_layernorm.weight": (h,)}
    found |= {f"{LAYER}self_attn.{p}_proj.weight": s for p, s in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q)))}
    found |= {f"{LAYER}mlp.{p}_proj.weight": s for p, s in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m)))}
    if bias:
        found |= {f"{LAYER}self_attn.{p}_proj.bias": (rows,) for p, rows in (("q", q), ("k", kv), ("v", kv))}
    return found


def facts(kv: int, per_kv: int, dim: int, hidden: int, mlp: int, vocab: int) -> ModelFacts:
    return ModelFacts("m", 1, kv * per_kv, kv, dim, hidden, mlp, vocab, 4, False, 64, 0)


models = st.builds(
    facts,
    kv=st.sampled_from([1, 2, 3, 4, 8]),
    per_kv=st.sampled_from([1, 2, 3, 4]),
    dim=st.sampled_from([8, 16, 64]),
    hidden=st.sampled_from([24, 64, 128, 256]),
    mlp=st.sampled_from([48, 96, 192]),
    vocab=st.integers(30, 300),
)


def filled(plan: Plan, of: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], bytes]:
    """Random tensors, and the file as the store would write it."""
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in of.items()}
    file = bytearray(plan.size)
    for name, place in plan.stored.items():
        data = tensors[name].tobytes()
        file[place.offset : place.offset + len(data)] = data
    return tensors, bytes(file)


def seen(plan: Plan, file: bytes, tp: int, rank: int) -> dict[str, np.ndarray]:
    """What an engine binds: mapped entries through whole pages, as mmap would."""
    views = {}
    for e in plan.entries(tp, rank):
        assert (e.private_bytes == 0) == e.mapped
        if e.mapped:
            padded = [(start, -(-size // PAGE_BYTES) * PAGE_BYTES) for start, size in e.segments]
            assert all(sum(p) <= len(file) for p in padded)
            data = b"".join(file[start : start + size] for start, size in padded)
        else:
            data = b"".join(file[start : start + size] for start, size in e.segments)
        flat = np.frombuffer(data, np.float32)
        last = e.offset + sum((n - 1) * s for n, s in zip(e.shape, e.stride, strict=True))
        assert last < sum(size for _, size in e.segments) // 4, e
        views[e.name] = np.lib.stride_tricks.as_strided(flat[e.offset :], e.shape, [4 * s for s in e.stride])
    return views


@settings(max_examples=60, deadline=None)
@given(models, st.booleans())
def test_every_rank_sees_its_slices_and_together_they_are_the_whole(f: ModelFacts, bias: bool) -> None:
    of = shapes(f, bias)
    plan = make_plan(f, of, 4, None)
    tensors, file = filled(plan, of)
    for tp in f.legal_tp(16):
        ranks = [seen(plan, file, tp, rank) for rank in range(tp)]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            whole = np.concatenate([r[name] for r in ranks])
            assert len(whole) == padded_vocabulary(f.vocab_size, tp)
            assert np.array_equal(whole[: f.vocab_size], tensors[name])
            assert not whole[f.vocab_size :].any()
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            assert np.array_equal(np.concatenate([r[LAYER + name] for r in ranks], 1), tensors[LAYER + name])
        gate_up = [np.split(r[LAYER + "mlp.gate_up_proj.weight"], 2) for r in ranks]
        for i, part in enumerate(("gate", "up")):
            assert np.array_equal(np.concatenate([g[i] for g in gate_up]), tensors[f"{LAYER}mlp.{part}_proj.weight"])
        replicas, kv_rows = max(1, tp // f.num_kv_heads), max(1, f.num_kv_heads // tp) * f.head_dim
        q_rows = f.num_heads // tp * f.head_dim
        for leaf in ("weight", "bias") if bias else ("weight",):
            qkv = [np.split(r[f"{LAYER}self_attn.qkv_proj.{leaf}"], [q_rows, q_rows + kv_rows]) for r in ranks]
            for i, (part, step) in enumerate((("q", 1), ("k", replicas), ("v", replicas))):
                assert np.array_equal(np.concatenate([x[i] for x in qkv[::step]]), tensors[f"{LAYER}self_attn.{part}_proj.{leaf}"])
                assert all(np.array_equal(x[i], qkv[rank - rank % step][i]) for rank, x in enumerate(qkv))


def test_no_private_bytes_where_slices_are_whole_pages_and_all_counted_where_not() -> None:
    smollm2 = facts(3, 3, 64, 576, 1536, 49152)
    plan = make_plan(smollm2, shapes(smollm2, False), 4, None)
    assert smollm2.legal_tp(9) == (1, 3)
    assert [plan.private_bytes(tp, tp - 1) for tp in (1, 3)] == [0, 0]
    odd = facts(2, 1, 8, 24, 48, 64)
    plan = make_plan(odd, shapes(odd, False), 4, None)
    assert plan.private_bytes(1, 0) == 0
    assert plan.private_bytes(2, 0) == (3 * 8 * 24 + 2 * 24 * 24) * 4


def test_what_cannot_be_planned_is_named() -> None:
    f = facts(2, 1, 8, 24, 48, 64)
    of = shapes(f, False)
    with pytest.raises(UnsupportedModel, match=r"lacks the tensor model\.norm\.weight"):
        make_plan(f, {k: v for k, v in of.items() if k != "model.norm.weight"}, 4, None)
    with pytest.raises(UnsupportedModel, match=r"lm_head.weight has shape \(63, 24\)"):
        make_plan(f, of | {"lm_head.weight": (63, 24)}, 4, None)
    with pytest.raises(UnsupportedModel, match="experts"):
        make_plan(f, of | {LAYER + "mlp.experts.0.weight": (2, 2)}, 4, None)
    with pytest.raises(UnsupportedModel, match="tp_size 3 is not one of 1, 2"):
        make_plan(f, of, 4, None).entries(3, 0)


def write_checkpoint(folder, dtype: str, values: np.ndarray, **config: object) -> None:
    header = json.dumps({"t": {"dtype": dtype, "shape": list(values.shape), "data_offsets": [0, values.nbytes]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    base = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    base |= {"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(base | config))


def test_facts_and_revision(tmp_path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config.json"):
        checkpoint.read_facts(str(tmp_path), "m")
    write_checkpoint(tmp_path, "BF16", np.zeros((4, 4), np.uint16))
    read = checkpoint.read_facts(str(tmp_path), "m")
    assert (read.head_dim, read.num_kv_heads, read.weight_bytes, read.dtype_bytes) == (16, 2, 32, 2)
    before = checkpoint.revision(str(tmp_path))
    write_checkpoint(tmp_path, "BF16", np.zeros((4, 4), np.uint16), rope_theta=5e5)
    assert checkpoint.revision(str(tmp_path)) != before
    for wrong, message in (({"architectures": ["GPT2"]}, "GPT2"), ({"quantization_config": {"a": 1}}, "quantised")):
        write_checkpoint(tmp_path, "BF16", np.zeros((4, 4), np.uint16), **wrong)
        with pytest.raises(UnsupportedModel, match=message):
            checkpoint.read_facts(str(tmp_path), "m")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion_equals_torch(tmp_path, dtype) -> None:
    import torch

    values = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    for name, given_dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        source = values.to(given_dtype)
        write_checkpoint(tmp_path, name, source.view(torch.uint8).numpy())
        with (tmp_path / "out").open("w+b") as out:
            fill.write(out.fileno(), 0, fill.sources(str(tmp_path))["t"], dtype)
        got = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=getattr(torch, dtype)).view(37, 11)
        assert torch.equal(got, source.to(getattr(torch, dtype)))
