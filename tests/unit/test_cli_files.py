"""YAML that a user names: what is wrong with it names file and line; nothing is taken in silence."""

from pathlib import Path

import pytest

from nitsum.errors import InvalidSpec
from nitsum_cli import files


def load(folder: Path, text: str) -> object:
    (folder / "f.yaml").write_text(text)
    return files.load_yaml(folder / "f.yaml")


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("duration: 1m\nstreams: []\nduration: 2m\n", 3, "duration", 1),
        ("tiers:\n  chat: {rate: 1}\n  agents: {rate: 1,\n    stddev: 2, rate: 2}\n", 4, "rate", 3),
        ("streams:\n  - {tier: a, tier: b}\n", 2, "tier", 2),
        ("1: a\n0x1: b\n", 2, "0x1", 1),
        ('a: 1\n"a": 1\n', 2, "a", 1),
        ("x: {y: &b {k: 1, k: 2}}\nz: *b\n", 1, "k", 1),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, text: str, line: int, key: str, first: int) -> None:
    with pytest.raises(InvalidSpec) as e:
        load(tmp_path, text)
    assert str(e.value) == f"{tmp_path / 'f.yaml'}: line {line}: key '{key}' is there twice, first in line {first}"


def test_what_a_merge_brings_may_be_set_again(tmp_path: Path) -> None:
    text = "a: &a {k: 1, l: 2}\nx: {deep: {b: &b {<<: *a, k: 3}}}\nc: {<<: *b, l: 4}\nd: {k: 1}\n"
    assert load(tmp_path, text) == {"a": {"k": 1, "l": 2}, "x": {"deep": {"b": {"k": 3, "l": 2}}}, "c": {"k": 3, "l": 4}, "d": {"k": 1}}


@pytest.mark.parametrize(
    "text",
    [
        "a: [\n",
        "a: 2026-99-99\n",
        "{a: 1}: b\n",
        "a: !foo 1\n",
        "!foo a: 1\n",
        "[" * 5000,
        "a: \x01\n",
        "a: 1\n---\nb: 1\n",
        "a: !!int ''\n",
        "? !!bool maybe\n",
        "!!seq a: 1\n",
    ],
)
def test_what_is_no_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"f\.yaml: .*not YAML: "):
        load(tmp_path, text)
