"""Preflight names what is missing, and only that."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from nitsum_local.binaries import go_version
from nitsum_local.preflight import Facts, missing

ROOT = Path(__file__).parents[2]
GOOD = Facts((3, 11), (1, 26), True, False, 25.0, 16.0, True, True)


def test_a_good_machine_lacks_nothing() -> None:
    assert missing(GOOD) == []


def test_go_matters_only_where_something_is_built() -> None:
    assert "Go 1.26" in str(missing(replace(GOOD, go=(1, 25)))[0])
    assert missing(replace(GOOD, go=None, build_needed=False)) == []


def test_disk_matters_only_before_the_environment_is_there() -> None:
    assert "20 GB" in str(missing(replace(GOOD, disk_free_gb=3.0))[0])
    assert "6 GB" in str(missing(replace(GOOD, disk_free_gb=3.0, environment_there=True))[0])
    assert missing(replace(GOOD, disk_free_gb=3.0, environment_there=True, build_needed=False)) == []


def test_everything_missing_is_named_at_once_with_a_remedy() -> None:
    found = missing(Facts((3, 9), None, True, False, 1.0, 2.0, False, False, False, False, 0.06, False))
    assert len(found) == 9
    assert all(m.remedy and "\n" not in str(m) for m in found)
    assert "python3-venv" in str(missing(replace(GOOD, uv_there_or_made=False))[0])


def test_a_containers_small_shared_memory_is_found_before_an_engine_dies_of_it() -> None:
    assert "/dev/shm" in str(missing(replace(GOOD, shared_memory_free_gb=0.064))[0])


def test_the_preflight_loads_without_packages_and_in_older_pythons() -> None:
    """It runs before anything is fetched: `-S` hides what is installed, and the grammar is that of Python 3.9."""
    for name in ("preflight", "binaries"):
        file = ROOT / f"local/nitsum_local/{name}.py"
        ast.parse(file.read_text(), feature_version=(3, 9))
        assert "from __future__ import annotations" in file.read_text()
    command = [sys.executable, "-S", "-c", "import nitsum_local.preflight as p; p.gather(p.Path.cwd())"]
    subprocess.run(
        command, env={"PYTHONPATH": str(ROOT / "local"), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}, cwd=ROOT, check=True, timeout=30
    )


def test_go_version_is_read_from_its_output() -> None:
    assert go_version("go version go1.26.8 linux/amd64") == (1, 26)
    assert go_version("") is None
