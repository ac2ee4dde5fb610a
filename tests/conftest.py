"""For all tests: where a run decides what lands (CI=true), hypothesis draws the same examples each time; elsewhere new ones."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
