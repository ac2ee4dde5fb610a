import os
import signal
import subprocess
import sys
from pathlib import Path

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
