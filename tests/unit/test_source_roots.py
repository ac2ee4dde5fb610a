"""Source roots are not packages: `operator/__init__.py` would shadow the standard library's operator and break Python itself."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("root", ["operator", "agent", "engine", "gateway", "core", "cli", "local", "proto"])
def test_no_source_root_is_a_package(root: str) -> None:
    assert (ROOT / root).is_dir()
    assert not (ROOT / root / "__init__.py").exists()
