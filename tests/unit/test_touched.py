"""The list of what we use of SGLang, against the code that uses it. SGLang itself is not loaded here."""

import ast
import re
from pathlib import Path

import pytest

from nitsum_sglang import touched

ROOT = Path(__file__).parents[2]
PLACES = [p for room in ("engine", "gateway", "agent") for p in sorted((ROOT / room).glob("*/**/*.py"))]
LISTED = {*touched.NAMES, *touched.FRONT_NAMES, *touched.FIELDS, "sglang.launch_server"}
"""The last one is a program: what it imports is here."""


def used(path: Path) -> set[str]:
    """Imported names as `module:name`, and dotted names in strings, as hooks and preloads have them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
            found |= {f"{node.module}:{a.name}" for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"sglang(\.\w+)+", node.value):
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", [p for p in PLACES if "testing" not in p.parts and p.name != "touched.py"], ids=lambda p: p.name)
def test_what_is_used_is_listed(path: Path) -> None:
    dotted = {n.replace(":", ".") for n in LISTED}
    known = dotted | {d.rsplit(".", k)[0] for d in dotted for k in (1, 2)}  # its module, and its class
    assert not {n for n in used(path) if n.replace(":", ".") not in known}


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touched.metadata, "version", lambda _: "9.9")
    monkeypatch.setattr(touched, "FIELDS", {})
    with pytest.raises(touched.IncompatibleEngine, match=r"version 9\.9, wanted .*json:gone: .*no\.such\.module: ") as e:
        touched.check(("json", "json:loads", "json:gone", "no.such.module"))
    assert "json:loads" not in str(e.value)
