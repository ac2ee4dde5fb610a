"""`nitsum`: one module per command."""

import typer

from nitsum_cli import capacity, plan, profile, profiles, simulate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("capacity")(capacity.command)
app.command("plan")(plan.command)
app.command("profile")(profile.command)
app.command("profiles")(profiles.command)
app.command("simulate")(simulate.simulate)


@app.callback()
def main() -> None:
    """SLO-tiered serving with tensor parallelism as a run-time knob."""


if __name__ == "__main__":
    app()
