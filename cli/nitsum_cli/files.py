"""Files that a user names: their errors name them, whatever is wrong."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nitsum.errors import InvalidSpec


def read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidSpec(str(path), f"cannot be read: {_why(e)}") from e


MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's own loader takes the last. What `<<` brings may be set again."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                name, line = self.construct_object(key), key.start_mark.line + 1
                if name in first:
                    raise InvalidSpec(f"{self.name}: line {line}", f"key {key.value!r} is there twice, first in line {first[name]}")
                first[name] = line
        return node


def load_yaml(path: Path) -> Any:
    """Raises InvalidSpec that names the file and line."""
    text = read(path)
    try:
        loader = _Loader(text)
        loader.name = str(path)
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as e:  # the loader lets some of its own through
        mark = getattr(e, "problem_mark", None)
        where = f"{path}: line {mark.line + 1}" if mark else str(path)
        raise InvalidSpec(where, f"not YAML: {getattr(e, 'problem', None) or e}") from e


def lines(path: Path) -> Iterator[str]:
    """Of a text file, gzipped or not; line ends as they are."""
    try:
        with path.open("rb") as f:
            gzipped = f.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", newline="") if gzipped else path.open(newline="") as text:
            yield from text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise InvalidSpec(str(path), f"cannot be read: {_why(e)}") from e


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as e:
        raise InvalidSpec(str(path), f"cannot be written: {_why(e)}") from e


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
