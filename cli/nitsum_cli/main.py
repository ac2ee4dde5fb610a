"""`nitsum`: one module per command."""

import typer

from nitsum_cli import profile, profiles

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Tensor parallelism as a run-time knob.")
app.command("profile")(profile.command)
app.command("profiles")(profiles.command)


@app.callback()
def main() -> None:
    """So that a single command keeps its name."""


if __name__ == "__main__":
    app()
