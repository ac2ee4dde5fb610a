"""Runs a command that does not outlive its parent: `python -I -S under.py <signal> <parent pid> <command...>`.

The kernel delivers <signal> when the parent dies, however it dies. Standard library only, and started by path without site
packages, so that it costs some 15 ms. A wrapper, because code between fork and exec of a threaded parent may deadlock.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    signal_number, parent, *command = argv
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):  # it died before we asked
        sys.exit("the parent is gone")
    try:
        os.execvp(command[0], command)
    except OSError as e:
        sys.exit(f"{command[0]}: {e.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
