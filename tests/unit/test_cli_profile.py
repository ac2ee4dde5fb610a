"""The commands as a user types them, and the arithmetic of the measuring plan."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nitsum.perf.profile import parse
from nitsum_cli.main import app
from nitsum_cli.measure.door import door_of, held_ms
from nitsum_cli.measure.steps import paces_ms
from nitsum_cli.measure.tp_table import filled

run = CliRunner()


def test_profiles_lists_what_ships_with_its_origin() -> None:
    shown = run.invoke(app, ["profiles"])
    assert shown.exit_code == 0
    line = next(x for x in shown.output.splitlines() if "llama-3.1-8b-instruct.h100_sxm" in x)
    for word in ("meta-llama/Llama-3.1-8B-Instruct", "h100_sxm", "1 2 4 8", "modelled", "aiconfigurator-core 0.12"):
        assert word in line
    listed = json.loads(run.invoke(app, ["profiles", "--json"]).output)
    by_name = {p["name"]: p for p in listed}
    assert by_name["llama-3.1-70b-instruct.h100_sxm"]["tp"] == [2, 4, 8]
    assert {p["origin"] for p in listed} <= {"modelled", "measured"}
    models = {p["model"].split("/")[-1] for p in listed if p["gpu"] in ("h100_sxm", "h200_sxm")}
    assert models == {"Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"}


def test_profile_writes_a_profile_of_a_config_that_nobody_knows(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "max_position_embeddings": 20000,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    out = tmp_path / "p.json"
    asked = ["profile", "--model", "acme/one-b", "--config", str(tmp_path / "c.json"), "--gpu", "H100", "--out", str(out)]
    assert run.invoke(app, [*asked, "--tp", "1"]).exit_code == 0
    assert run.invoke(app, [*asked, "--tp", "2", "--merge"]).exit_code == 0
    p = parse(out.read_text(), "p")
    assert (p.model, p.gpu, p.tp_sizes, p.origin, p.context_length) == ("acme/one-b", "h100_sxm", (1, 2), "modelled", 20000)
    assert p.decode_ms(2, 1, 1000) < p.decode_ms(1, 1, 1000) < 4
    wrong = run.invoke(app, ["profile", "--model", "acme/two-b", *asked[3:], "--tp", "2", "--merge"])
    assert wrong.exit_code == 2
    assert "error: --merge:" in wrong.stderr


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--gpu", "h100"], "error: --model: is needed"),
        (["--model", "Qwen/Qwen3-8B"], "error: --gpu: is needed"),
        (["--model", "Qwen/Qwen3-8B", "--gpu", "h100", "--tp", "two"], "error: --tp: 'two' is not a list"),
        (["--model", "Qwen/Qwen3-8B", "--gpu", "h100", "--config", "/none.json"], "error: --config: /none.json: No such file"),
        (["--from-engine", "http://127.0.0.1:9", "--tp", "1"], "error: --tp: an engine has the TP"),
        (["--from-engine", "http://127.0.0.1:9"], "error: --from-engine: http://127.0.0.1:9: ConnectError"),
        (["--from-engine", "nonsense"], "error: --from-engine: nonsense: UnsupportedProtocol"),
    ],
)
def test_bad_requests_end_with_2_and_name_the_option(tmp_path: Path, asked: list[str], says: str) -> None:
    shown = run.invoke(app, ["profile", *asked, "--out", str(tmp_path / "p.json")])
    assert shown.exit_code == 2
    assert says in shown.stderr
    assert not (tmp_path / "p.json").exists()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    shown = run.invoke(app, ["profile", "--model", "Qwen/Qwen3-8B", "--gpu", "h100", "--out", str(tmp_path / "p.json")])
    assert shown.exit_code == 2
    assert "install nitsum[profile], or measure with --from-engine" in shown.stderr


def test_the_pace_counts_only_where_all_streams_run_and_bursts_do_not_fool_it() -> None:
    """Steps of 10 ms whose messages come two at a time, from 1.0 s on with the other stream's."""
    alone = [(0.1 * i, i) for i in range(1, 10)]
    bursts = [(1.0 + 0.02 * (i // 2), 10 + i) for i in range(40)]
    steady = [(1.0 + 0.01 * i, 1 + i) for i in range(36)]
    assert paces_ms([alone + bursts, steady]) == pytest.approx([10, 10])
    at_once = [(1.0, 1), *((1.23, n) for n in range(2, 25))]
    assert paces_ms([at_once]) == pytest.approx([10]), "a client that was late for all but the first"
    assert paces_ms([at_once[1:]]) == [], "of one burst nothing is known"


def test_cells_that_do_not_fit_grow_as_attention_does() -> None:
    assert filled([[10.0, 11.0], [12.0, 16.0], [20.0, None]], (1, 4, 8)) == ([[10.0, 11.0], [12.0, 16.0], [20.0, 28.0]], 1)


def test_the_door_is_what_a_prompt_takes_beyond_what_it_holds_a_stream_up() -> None:
    held = held_ms([(0.24, 0.284, 4), (0.24, 0.28, 4), (0.24, 0.4, 4)])
    assert held == pytest.approx(11)
    assert door_of(15.0, held) == pytest.approx(4.0)
    assert door_of(15.0, -5.0) == pytest.approx(7.5), "a noisy pair cannot make all of it door"
    assert door_of(15.0, 25.0) == 0.0
