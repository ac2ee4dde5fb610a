"""For all tests: where a run decides what lands (CI=true), hypothesis draws the same examples each time; elsewhere new ones."""

import os
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


class _BySystem(LoadFileScheduling):
    """As `--dist loadfile`, but all files of tests/e2e are one, since they share the one running system."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "system" if file.startswith("tests/e2e/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _BySystem(config, log) if config.getvalue("dist") == "loadfile" else None
