"""What every command does with bad input: the field and the remedy on stderr, exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from nitsum.errors import NitsumError

P = ParamSpec("P")


def bad_input_exits_2(command: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except NitsumError as e:
            print(f"error: {e}", file=sys.stderr)
            raise typer.Exit(2) from e

    return run
