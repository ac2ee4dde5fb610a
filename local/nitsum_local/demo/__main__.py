"""`make demo`."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from kubernetes.client import ApiException
from rich.console import Console

from nitsum_local.demo.program import PROGRAMS
from nitsum_local.demo.scenario import Scenario
from nitsum_local.demo.view import View
from nitsum_local.processes import run

ROOT = Path(__file__).parents[3]


class Model(StrEnum):
    SMOLLM2 = "smollm2"
    TINY = "tiny"
    BRIEF = "brief"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    keep: Annotated[bool, typer.Option("--keep", help="stay up after the summary, until Ctrl-C")] = False,
    model: Annotated[Model, typer.Option(help="tiny, brief: a random model, for tests of the demo itself")] = Model.SMOLLM2,
    state: Annotated[Path, typer.Option(help="logs, kubeconfigs, demo.json")] = ROOT / ".nitsum",
) -> None:
    """A ServingPool on a real control plane, served by SGLang, flips its TP while requests stream."""
    os.umask(0o077)
    program = PROGRAMS[model]
    view = View(Console(highlight=False), program.tiers)
    scenario = Scenario(ROOT, state / "demo", program, view)

    async def demo() -> int:
        try:
            summary = await scenario.run(keep)
        except (RuntimeError, OSError, ApiException) as e:  # TimeoutError is an OSError
            print(f"make demo: {e}\nlogs: {state / 'demo/log'}", file=sys.stderr)
            return 1
        if not summary.good:
            print(f"make demo: it did not show what it promises; logs: {state / 'demo/log'}", file=sys.stderr)
        return 0 if summary.good else 2

    def say(line: str) -> None:
        try:
            view.say(line)
        except OSError:  # Ctrl-C ended what we were piped into as well: no reason to end with another exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    sys.exit(run(demo(), say))


if __name__ == "__main__":
    app()
