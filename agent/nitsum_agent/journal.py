"""The agent's journal: JSON lines on disk before the host hears of a directive, and again with what the host answered.

Four kinds of line: `term` (a leader was heard), `directive` alone (found good, not answered yet), `directive` with `answer`, and `memory`
(what a compaction kept). A torn last line (killed while writing) is dropped: whoever sent that directive got no answer and sends it again.
Fields that this version does not know, written by a later one, are left out: an agent can go back a version.
"""

import json
import os
from pathlib import Path
from typing import Any

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
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, json_format.ParseError) as e:
                raise ValueError(f"{self.path}: line {n + 1} is damaged ({e}); remove the file to forget all directives") from e
            self._lines += 1
        return whole if whole != len(data) else None

    def _take(self, entry: dict[str, Any]) -> None:
        if "memory" in entry:
            self.memory = _memory(entry["memory"])
        elif "term" in entry:
            self.memory.saw(int(entry["term"]))
        elif "answer" in entry:
            self.memory.answered(_directive(entry["directive"]), _answer(entry["answer"]))
        else:
            self.memory.found_good(_directive(entry["directive"]))

    def saw(self, term: int) -> None:
        """On disk when it returns."""
        self._append({"term": term})
        self.memory.saw(term)
        self._keep_short()

    def found_good(self, directive: agent_pb2.NodeDirective) -> None:
        """On disk when it returns: if the agent dies now, the restarted one hands it to the host."""
        self._append({"directive": json_format.MessageToDict(directive)})
        self.memory.found_good(directive)
        self._keep_short()

    def answered(self, directive: agent_pb2.NodeDirective, answer: agent_pb2.ApplyResponse) -> None:
        """On disk when it returns."""
        self._append({"directive": json_format.MessageToDict(directive), "answer": json_format.MessageToDict(answer)})
        self.memory.answered(directive, answer)
        self._keep_short()

    def _append(self, entry: dict[str, Any]) -> None:
        new = not self.path.exists()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            whole = os.fstat(fd).st_size
            try:
                write_all(fd, _line(entry))
                os.fsync(fd)
            except OSError:  # a full disk: half a line must not stay, the next one would grow on it
                os.ftruncate(fd, whole)
                raise
        finally:
            os.close(fd)
        if new:
            self._sync_folder()
        self._lines += 1

    def _keep_short(self) -> None:
        if self._lines > LINES_MAX:
            self._compact()

    def _compact(self) -> None:
        m = self.memory
        kept = {
            "highest_term": m.highest_term,
            "generation": m.generation,
            "directive": json_format.MessageToDict(m.directive) if m.directive is not None else None,
            "pending": json_format.MessageToDict(m.pending) if m.pending is not None else None,
            "answers": {i: json_format.MessageToDict(a) for i, a in m.answers.items()},
        }
        temporary = self.path.with_suffix(".new")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            f.write(_line({"memory": kept}))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.path)
        self._sync_folder()
        self._lines = 1

    def _sync_folder(self) -> None:
        """A new name is on disk only when its folder is."""
        fd = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _directive(raw: Any) -> agent_pb2.NodeDirective:
    return json_format.ParseDict(raw, agent_pb2.NodeDirective(), ignore_unknown_fields=True)


def _answer(raw: Any) -> agent_pb2.ApplyResponse:
    return json_format.ParseDict(raw, agent_pb2.ApplyResponse(), ignore_unknown_fields=True)


def _memory(raw: dict[str, Any]) -> Memory:
    directive = _directive(raw["directive"]) if raw["directive"] is not None else None
    pending = _directive(raw["pending"]) if raw.get("pending") is not None else None
    answers = {i: _answer(a) for i, a in raw["answers"].items()}
    return Memory(int(raw["highest_term"]), int(raw["generation"]), directive, pending, answers)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
