"""The shipped Llama-3.1-8B profile against known figures, and tables against the kernel model that they were made from."""

import random
from statistics import median

import pytest

from nitsum.errors import InvalidSpec
from nitsum.perf.profile import dump, find, load_shipped, parse
from nitsum_cli import modelled

LLAMA = load_shipped("llama-3.1-8b-instruct.h100_sxm")
KERNELS = modelled.Tables(modelled.model_config(LLAMA.model, None), LLAMA.gpu)

TPOT_MS = {1: (6.6, 7.4, 9.5, 18.3), 2: (4.1, 4.4, 5.6, 10.3), 4: (2.6, 2.8, 3.5, 6.3), 8: (2.0, 2.2, 2.7, 4.3)}
"""At batch 1, 8, 32, 128 and context 2048."""
TTFT_2K_MS = {1: 46, 2: 27, 4: 20, 8: 16}


@pytest.mark.parametrize("tp", LLAMA.tp_sizes)
def test_step_times_of_llama_8b_on_h100(tp: int) -> None:
    assert [LLAMA.decode_ms(tp, b, 2048) for b in (1, 8, 32, 128)] == pytest.approx(TPOT_MS[tp], rel=0.02, abs=0.06)
    assert LLAMA.prefill_ms(tp, 2048) == pytest.approx(TTFT_2K_MS[tp], abs=0.5)


@pytest.fixture(scope="module", params=[1, 8])
def kernels(request: pytest.FixtureRequest):
    return request.param, KERNELS.engine(request.param)


def errors(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """(median, 95th percentile) of |table - kernels| / kernels."""
    found = sorted(abs(ours / theirs - 1) for ours, theirs in pairs)
    return median(found), found[int(len(found) * 0.95)]


def test_decode_between_the_grid_points(kernels) -> None:
    tp, engine = kernels
    r, pairs, most = random.Random(tp), [], LLAMA.kv_capacity_tokens(tp, (tp,))
    while len(pairs) < 500:
        batch, ctx = round(2 ** r.uniform(0, 9)), round(2 ** r.uniform(4, 17))
        if batch * ctx <= most:
            pairs.append((LLAMA.decode_ms(tp, batch, ctx), engine.predict_decode_latency(batch, ctx, 2)))
    middle, far = errors(pairs)
    assert middle < 0.01
    assert far < 0.05


def test_prefill_between_the_grid_points(kernels) -> None:
    tp, engine = kernels
    r, pairs = random.Random(tp), []
    for _ in range(500):
        chunk, cached = round(2 ** r.uniform(6, 15)), r.choice((0, round(2 ** r.uniform(6, 16))))
        pairs.append((LLAMA.prefill_ms(tp, chunk, cached), engine.predict_prefill_latency(1, chunk + cached, cached)))
    middle, far = errors(pairs)
    assert middle < 0.015
    assert far < 0.07


def test_several_prompts_in_one_step_do_not_attend_to_each_other(kernels) -> None:
    tp, engine = kernels
    for sequences, length in ((2, 1024), (4, 2048), (8, 1024), (16, 512)):
        assert LLAMA.prefill_ms(tp, sequences * length, 0, sequences) == pytest.approx(
            engine.predict_prefill_latency(sequences, length), rel=0.06
        )


def test_the_formula_of_the_mixed_step(kernels) -> None:
    """aiconfigurator takes the mean over a prompt's chunks; so does this."""
    tp, engine = kernels
    r, pairs, most = random.Random(tp), [], LLAMA.kv_capacity_tokens(tp, (tp,))
    while len(pairs) < 300:
        chunk, batch, chunks = round(2 ** r.uniform(7, 13)), round(2 ** r.uniform(0, 8)), r.choice((1, 1, 2, 4))
        if batch * chunk * chunks <= most:
            ours = sum(LLAMA.mixed_ms(tp, chunk, batch, chunk * chunks, i * chunk) for i in range(chunks)) / chunks
            pairs.append((ours, engine.mixed_step_latency(chunk, batch, chunk * chunks, 2)))
    middle, far = errors(pairs)
    assert middle < 0.04
    assert far < 0.12


def test_the_shipped_file_is_what_the_command_writes() -> None:
    """At one TP, to save time."""
    made = modelled.profile(LLAMA.model, "NVIDIA-H100-80GB-HBM3", (8,))
    again = parse(dump(made), LLAMA.name)
    assert again.tables[8] == LLAMA.tables[8]
    assert (again.memory, again.flip, again.source, again.aliases) == (LLAMA.memory, LLAMA.flip, LLAMA.source, LLAMA.aliases)


def test_kv_capacity_follows_what_is_resident() -> None:
    """80 GiB less one copy of the smallest TP's shard and 3 GB an engine; SGLang alone takes 0.83 of the GPU by default: 422k tokens."""
    alone = LLAMA.kv_capacity_tokens(1, (1,))
    assert alone == pytest.approx(422_000, rel=0.02)
    assert LLAMA.kv_capacity_tokens(1, (1, 2, 4, 8)) == pytest.approx(alone - 9e9 * 0.85 / 131_072, rel=0.001)
    whole = LLAMA.kv_capacity_tokens(8, (1, 8))
    assert whole < LLAMA.kv_capacity_tokens(8, (2, 8)) < LLAMA.kv_capacity_tokens(8, (8,))
    assert find("meta-llama/Llama-3.3-70B-Instruct", "h100_sxm").tp_sizes == (2, 4, 8)


def test_the_flip_of_128_streams_of_2k() -> None:
    """34 GB of KV a GPU at TP1: 0.7 s over PCIe, about 6 s computed again."""
    from nitsum.layout import FlipMode

    tokens = 128 * 2048
    copied = LLAMA.flip_parts(tokens, FlipMode.MIGRATE_FIRST, 1, 2, 128)
    computed = LLAMA.flip_parts(tokens, FlipMode.ABORT, 1, 1, 128)
    assert copied.kv == "Copied"
    assert copied.kv_ms == pytest.approx(690, rel=0.03)
    assert computed.kv_ms == pytest.approx(5900, rel=0.03)
    assert LLAMA.flip_parts(tokens, FlipMode.MIGRATE_FIRST, 1, 1).kv == LLAMA.flip_parts(tokens, FlipMode.LET_FINISH, 1, 8).kv == "Kept"
    assert LLAMA.pause_ms(0, FlipMode.ABORT, 1, 8) == LLAMA.flip.fixed_ms
    assert LLAMA.pause_ms(1000, FlipMode.ABORT, 1, 2) < LLAMA.pause_ms(2000, FlipMode.ABORT, 1, 2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("nobody/none", "h100_sxm"), r"--model: no config of 'nobody/none'.*--config.*qwen/qwen3-8b"),
        (("Qwen/Qwen3-8B", "h101"), r"--gpu: no kernel tables of 'h101'; there are: .*h100_sxm.*h200_sxm"),
        (("Qwen/Qwen3-8B", "h100", (3,)), r"--tp: TP 3 does not divide Qwen/Qwen3-8B; legal are 1, 2, 4, 8"),
        (("meta-llama/Llama-3.1-70B-Instruct", "h100", (1,)), r"--tp: TP 1 does not fit on h100_sxm: 141\.1 GB of weights"),
        (("meta-llama/Meta-Llama-3.1-405B", "l40s"), r"--gpu: meta-llama/Meta-Llama-3.1-405B fits on l40s at no TP"),
    ],
)
def test_bad_requests_name_the_option_and_what_is_legal(asked: tuple, says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        modelled.profile(*asked)
