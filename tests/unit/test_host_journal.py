import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nitsum_host import journal as journal_module
from nitsum_host.journal import Journal


def test_a_torn_line_is_dropped_and_the_epoch_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(state="Closing", epoch=4)
    journal.close()
    with (tmp_path / "journal.jsonl").open("ab") as f:
        f.write(b'{"state": "Par')
    again = Journal(tmp_path)
    assert again.epoch == 4
    again.write(state="Done", epoch=5)
    again.close()
    assert [e["state"] for e in Journal(tmp_path).entries] == ["Closing", "Done"]


def test_a_fault_file_kills_once(tmp_path: Path) -> None:
    code = "import sys, pathlib; from nitsum_api.fault import maybe_die; maybe_die('host.parked', pathlib.Path(sys.argv[1]))"
    argv = [sys.executable, "-c", code, str(tmp_path)]
    (tmp_path / "fault").write_text("host.parked\n")
    env = {k: v for k, v in os.environ.items() if k != "NITSUM_FAULT"}
    assert subprocess.run(argv, env=env, check=False).returncode == -signal.SIGKILL
    assert subprocess.run(argv, env=env, check=False).returncode == 0


def test_it_stays_bounded_and_keeps_the_highest_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LINES_MAX", 10)
    journal = Journal(tmp_path)
    journal.write(epoch=99)
    for i in range(100):
        journal.write(epoch=i % 5)
    assert len((tmp_path / "journal.jsonl").read_bytes().splitlines()) < 20
    assert Journal(tmp_path).epoch == 99


def test_after_a_write_that_failed_half_way_the_next_line_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    write = os.write

    def full(fd: int, data: bytes) -> int:
        write(fd, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.write(epoch=3)
    journal.write(epoch=4)
    assert [e["epoch"] for e in Journal(tmp_path).entries] == [4]
