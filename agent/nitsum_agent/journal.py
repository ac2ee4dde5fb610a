"""The agent's journal: one JSON line per directive that it answered, on disk before the host hears of it.

A torn last line (killed while writing) is dropped: whoever sent that directive got no answer and sends it again.
"""

import json
import os
from pathlib import Path

from google.protobuf import json_format

from nitsum_agent.obedience import Memory
from nitsum_api.agent.v1 import agent_pb2

LINES_MAX = 512
"""Compacted to what memory holds past this many lines."""


class Journal:
    """Raises OSError when the disk refuses, ValueError for a damaged line that is not the last."""

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = state_dir / "directives.jsonl"
        self.memory = Memory()
        self._lines = 0
        whole = self._read()
        if whole is not None:  # cut a torn line off, or the next one would grow on it
            os.truncate(self.path, whole)

    def _read(self) -> int | None:
        if not self.path.exists():
            return None
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for n, line in enumerate(data[:whole].splitlines()):
            try:
                entry = json.loads(line)
                directive = json_format.ParseDict(entry["directive"], agent_pb2.NodeDirective())
                answer = json_format.ParseDict(entry["answer"], agent_pb2.ApplyResponse())
            except (ValueError, KeyError) as e:
                raise ValueError(f"{self.path}: line {n + 1} is damaged ({e}); remove the file to forget all directives") from e
            self.memory.obeyed(directive, answer)
            self._lines += 1
        return whole if whole != len(data) else None

    def write(self, directive: agent_pb2.NodeDirective, answer: agent_pb2.ApplyResponse) -> None:
        """On disk when it returns."""
        with self.path.open("ab") as f:
            os.fchmod(f.fileno(), 0o600)
            f.write(_line(directive, answer))
            f.flush()
            os.fdatasync(f.fileno())
        self.memory.obeyed(directive, answer)
        self._lines += 1
        if self._lines > LINES_MAX:
            self._compact()

    def _compact(self) -> None:
        """The directive in force and the highest term are all that a restart needs."""
        temporary = self.path.with_suffix(".new")
        accepted = agent_pb2.ApplyResponse(accepted=agent_pb2.ApplyResponse.Accepted())
        last = agent_pb2.NodeDirective()
        if self.memory.directive is not None:
            last.CopyFrom(self.memory.directive)
        last.term = self.memory.highest_term
        with temporary.open("wb") as f:
            f.write(_line(last, accepted))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.path)
        self._lines = 1


def _line(directive: agent_pb2.NodeDirective, answer: agent_pb2.ApplyResponse) -> bytes:
    entry = {"directive": json_format.MessageToDict(directive), "answer": json_format.MessageToDict(answer)}
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
