"""The binaries' cache, with a `go` that is a script: builders that fail, are killed, or come together."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nitsum_local import binaries

GO = """#!/bin/sh
[ "$1" = version ] && { echo "go version go1.26.1 linux/amd64"; exit; }
echo start >> "$TRACE"; echo "$GOFLAGS|$*" >> "$TRACE.args"
while [ $# -gt 1 ]; do [ "$1" = -o ] && out="$2"; shift; done
echo half > "$out"; sleep "${SLOW:-0}"; [ -n "$BROKEN" ] && { echo "no such package" >&2; exit 1; }
echo whole > "$out"; chmod +x "$out"
"""


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which every build adds a line."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/go").write_text(GO)
    (tmp_path / "bin/go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path / "trace"


def builder(**env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "nitsum_local.binaries", "etcd"], env={**os.environ, **env}, stdout=subprocess.DEVNULL)


def starts(trace: Path) -> int:
    return trace.read_text().count("start") if trace.exists() else 0


def test_built_once_with_our_flags_whatever_the_shell_says(go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOFLAGS", "-mod=mod")
    said: list[str] = []
    first = binaries.ensure(("etcd",), said.append)["etcd"]
    assert binaries.ensure(("etcd",), said.append)["etcd"] == first
    assert first.read_text() == "whole\n"
    assert starts(go) == 1
    flags, _, words = go.with_suffix(".args").read_text().partition("|")
    assert flags == ""
    assert "-mod=readonly" in words
    assert any("built etcd" in line for line in said)


def test_another_module_or_toolchain_is_another_folder(go: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {binaries.cache_dir("go1"), binaries.cache_dir("go2")}
    (tmp_path / "go.mod").write_text("module x")
    (tmp_path / "go.sum").write_text("")
    monkeypatch.setattr(binaries, "MODULE", tmp_path)
    folders.add(binaries.cache_dir("go1"))
    (tmp_path / "go.sum").write_text("x v1 h1:other")
    folders.add(binaries.cache_dir("go1"))
    monkeypatch.setattr(binaries, "FLAGS", ("-race",))
    folders.add(binaries.cache_dir("go1"))
    assert len(folders) == 5


def test_a_failed_build_is_told_and_leaves_nothing_to_trust(go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(binaries.BinariesMissing, match="no such package"):
        binaries.ensure(("etcd",), lambda line: None)
    monkeypatch.delenv("BROKEN")
    assert binaries.ensure(("etcd",), lambda line: None)["etcd"].read_text() == "whole\n"


def test_two_builders_build_once_and_a_killed_one_leaves_no_half(go: Path) -> None:
    killed = builder(SLOW="30")
    while starts(go) < 1:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    both = [builder(SLOW="1"), builder(SLOW="1")]
    assert [b.wait(30) for b in both] == [0, 0]
    assert starts(go) == 2
    built = binaries.ensure(("etcd",), lambda line: None)["etcd"]
    assert built.read_text() == "whole\n"
    assert sorted(f.name for f in built.parent.iterdir()) == [".lock", "etcd"]
    assert not [p for p in Path("/proc").glob("[0-9]*") if str(built.parent) in _command(p)]


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_assets_come_first_and_only_what_they_lack_is_built(go: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("kube-apiserver", "kubectl"):
        (assets / name).write_text("")
        (assets / name).chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    found = binaries.ensure(("etcd", "kube-apiserver"), lambda line: None)
    assert found["kube-apiserver"] == assets / "kube-apiserver"
    assert found["etcd"].read_text() == "whole\n"
    assert starts(go) == 1
    assert binaries.kubectl() == assets / "kubectl"


def test_an_existing_cluster_is_used_by_these_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/somewhere")
    for value, expected in (("", False), ("false", False), ("1", False), ("true", True), ("True", True)):
        monkeypatch.setenv("USE_EXISTING_CLUSTER", value)
        assert binaries.use_existing() is expected
    assert "etcd" not in binaries.needed()
