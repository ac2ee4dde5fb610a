"""`make demo`. Its traffic and measuring are here (`traffic.py`), its stage is not built yet: this says so instead of pretending."""

import sys

if __name__ == "__main__":
    sys.exit("make demo is not built yet; the same work runs as a test: pytest tests/e2e/test_dataplane.py -s   (see CHANGELOG.md)")
