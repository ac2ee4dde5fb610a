"""What guards the contracts is itself tried: a change that peers would misread and generated code that was forgotten are both found."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("agent/v1/agent.proto", "  uint64 generation = 2;\n", "", "misread"),
        ("node/v1/node.proto", "  uint64 epoch = 3;\n", "  string epoch = 3;\n", "misread"),
        (
            "types/v1/types.proto",
            "  string uid = 2;\n",
            "  string uid = 2;\n  string also = 3;\n",
            "types_pb2.py is not what its .proto says",
        ),
    ],
    ids=["a field is gone", "a type is another", "generated code is old"],
)
def test_a_change_that_is_not_carried_through_is_found(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    proto = tmp_path / "proto/nitsum_api" / file
    text = proto.read_text()
    assert text.count(old) >= 1
    proto.write_text(text.replace(old, new, 1))
    done = subprocess.run([tmp_path / "proto/generate.sh", "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert said in done.stderr
