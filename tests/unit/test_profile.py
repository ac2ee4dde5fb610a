import json
from dataclasses import replace

import pytest

from nitsum.errors import InvalidSpec
from nitsum.layout import FlipMode
from nitsum.perf.correction import Corrected
from nitsum.perf.profile import dump, find, load_shipped, parse, shipped
from nitsum.sim.steptimes import QuickModel


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_say_where_they_come_from_and_behave(name: str) -> None:
    p = load_shipped(name)
    assert p.origin in ("modelled", "measured")
    assert p.note
    for tp in p.tp_sizes:
        assert p.decode_ms(tp, 1, 128) < p.decode_ms(tp, 32, 128) < p.decode_ms(tp, 64, 128)
        assert p.prefill_ms(tp, 100) < p.prefill_ms(tp, 20_000)
        assert p.mixed_ms(tp, 100, 4, 128) > max(p.prefill_ms(tp, 100), p.decode_ms(tp, 4, 128))
    assert p.pause_ms(5000, FlipMode.MIGRATE_FIRST, 1, p.tp_sizes[-1]) <= p.pause_ms(5000, FlipMode.ABORT, 1, p.tp_sizes[-1])
    assert find(p.model, p.gpu) == p


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InvalidSpec, match=r"spec\.profile: no profile 'x'; there are: .*tiny-llama\.slot"):
        load_shipped("x")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"origin": "guessed"}, "origin"),
        ({"tp": {}}, "tp"),
        ({"tp": {"1": {}}}, r"tp\.1"),
        ({"tp": {"1": {"decode": {"batch": [2, 1], "context": [1], "ms": [[1], [1]]}}}}, r"tp\.1\.decode\.batch"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidSpec, match=rf"profile p: {field}"):
        parse(json.dumps({"origin": "modelled", **change}), "p")


TABLE = {
    "decode": {"batch": [1, 2], "context": [10, 20], "ms": [[1, 2], [2, 3]]},
    "prefill": {"tokens": [1, 10], "cached": [0, 5], "ms": [[1, 2], [2, 3]]},
    "memory": {"weight_bytes": 100, "kv_bytes_per_token": 1},
}
FLIP = {"path": "host", "pcie_bytes_per_s": 1, "host_bytes_per_s": 1, "nvlink_bytes_per_s": 1}


def table(**change: object) -> dict[str, object]:
    return {"tp": {"1": TABLE | change}, "memory": {"gpu_bytes": 1000, "engine_bytes": 1}, "flip": FLIP}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (table() | {"format": 3}, r"format: 3 is not known here; legal are 1 and 2"),
        (table() | {"tpp": 1}, r"tpp: unknown field; legal are .*context_length"),
        (table() | {"mixed": "none"}, r"mixed: must be `fused` or `overlap` or `separate`"),
        (table() | {"tp": {"1.5": TABLE}}, r"tp\.1\.5: a TP degree is a whole number"),
        (table() | {"tp": {"0": TABLE}}, r"tp\.0: a TP degree is a whole number"),
        (table() | {"flip": FLIP | {"path": "disk"}}, r"flip\.path: must be `host` or `peer`"),
        (table() | {"flip": FLIP | {"pcie_bytes_per_s": 0}}, r"flip\.pcie_bytes_per_s: must be above 0, not 0"),
        (table() | {"flip": [1]}, r"flip: must be an object"),
        (table() | {"memory": {"gpu_bytes": 1, "kv_fraction": 1.5}}, r"memory\.kv_fraction: must be above 0 and at most 1, not 1\.5"),
        (table() | {"memory": {"gpu_bytes": "80G"}}, r'memory\.gpu_bytes: must be a number, not "80G"'),
        (table() | {"aliases": "x"}, r"aliases: must be a list of model names"),
        (table(kv_tokens=-1), r"tp\.1\.kv_tokens: must be at least 0, not -1"),
        (table(memory={"weight_bytes": 1}), r"tp\.1\.memory: lacks 'kv_bytes_per_token'"),
        (table(prefill={"tokens": [1], "cached": [3], "ms": [[1]]}), r"tp\.1\.prefill\.cached: must begin with 0"),
        (table(decode=TABLE["decode"] | {"ms": [[1, 2], [0.5, 3]]}), r"decode\.ms\[1\]\[0\]: 0\.5 is below .* never faster with more work"),
        (table(decode=TABLE["decode"] | {"ms": [[1, 2]]}), r"decode\.ms: must hold 2 rows"),
        (table(decode=TABLE["decode"] | {"ms": [[1], [2]]}), r"decode\.ms\[0\]: must hold 2 values"),
        (table(decode=TABLE["decode"] | {"ms": [[0, 2], [2, 3]]}), r"decode\.ms\[0\]\[0\]: must be above 0"),
        (table(decode=TABLE["decode"] | {"ms": [[1, None], [2, 3]]}), r"decode\.ms\[0\]\[1\]: must be a number, not null"),
        ({"tp": {"1": {k: v for k, v in TABLE.items() if k != "memory"}}}, r"tp\.1: lacks 'memory' .* or 'kv_tokens'"),
        ({"tp": {"1": TABLE}}, r"tp\.1\.kv_tokens: must be above 0 where the profile has no `memory`"),
    ],
)
def test_the_newer_form_names_its_wrong_fields_too(change: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidSpec, match=rf"profile p: (tp\.1\.)?{says}"):
        parse(json.dumps({"origin": "modelled", **change}), "p")


def test_not_json_names_the_line() -> None:
    with pytest.raises(InvalidSpec, match="profile p: line 2: not JSON"):
        parse('{\n"a" 1}', "p")


@pytest.mark.parametrize(
    ("model", "gpu", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "llama-3.1-8b-instruct.h100_sxm"),
        ("meta-llama/Meta-Llama-3.1-8B", "NVIDIA-H100-80GB-HBM3", "llama-3.1-8b-instruct.h100_sxm"),
        ("/models/Llama-3.1-8B-Instruct/", "H200", "llama-3.1-8b-instruct.h200_sxm"),
        ("qwen/qwen3-32b", "h100-sxm", "qwen3-32b.h100_sxm"),
        ("meta-llama/Llama-3.3-70B-Instruct", "NVIDIA H200", "llama-3.1-70b-instruct.h200_sxm"),
        ("tiny-llama", "slot", "tiny-llama.slot"),
        ("Qwen/Qwen3-32B", "l4", None),
        ("Qwen/Qwen3-3", "h100", None),
    ],
)
def test_common_names_find_their_profile(model: str, gpu: str, name: str | None) -> None:
    found = find(model, gpu)
    assert (found.name if found else None) == name


def test_the_demo_profiles_cost_what_they_did() -> None:
    """The older form: one prefill of all tokens, a flat copy rate, KV as calibrated."""
    p = load_shipped("tiny-llama.slot")
    assert p.pause_ms(2048, FlipMode.ABORT, 1, 2) == pytest.approx(100 + 142.88)
    assert p.pause_ms(2048, FlipMode.MIGRATE_FIRST, 1, 2) == pytest.approx(100 + 2048 / 50)
    assert p.prefill_ms(1, 512, 512) == pytest.approx(max(p.prefill_ms(1, 1024) - p.prefill_ms(1, 512), 91.2))
    assert p.mixed_ms(1, 128, 4, 128) == pytest.approx(52.8 + 88.05 - 40.1)
    assert [p.kv_capacity_tokens(tp, (1,)) for tp in (1, 2)] == [8192, 16384]


def test_what_a_request_waits_outside_the_engine_is_kept() -> None:
    p = load_shipped("tiny-llama.slot")
    assert p.door_ms(1) == 0.0
    own = replace(p, tables={tp: replace(t, door_ms=2.5) for tp, t in p.tables.items()})
    again = parse(dump(own), "again")
    assert [again.door_ms(tp) for tp in again.tp_sizes] == [2.5] * len(again.tp_sizes)
    assert QuickModel(again).door_ms(1) == Corrected(again).door_ms(1) == 2.5
