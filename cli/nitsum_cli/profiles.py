"""`nitsum profiles`: what ships."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nitsum.perf.profile import Profile, load_shipped, shipped


def facts(p: Profile) -> dict[str, Any]:
    """As `--json` prints them."""
    return {
        "name": p.name,
        "model": p.model,
        "aliases": list(p.aliases),
        "gpu": p.gpu,
        "tp": list(p.tp_sizes),
        "context_length": p.context_length or None,
        "origin": p.origin,
        "source": p.source,
        "kv_tokens": {str(tp): p.kv_capacity_tokens(tp, p.tp_sizes) for tp in p.tp_sizes},
        "note": p.note,
    }


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the profiles in the package: model, GPU, TP degrees, and whether they were modelled or measured."""
    found = [load_shipped(name) for name in shipped()]
    if as_json:
        typer.echo(json.dumps([facts(p) for p in found], indent=1))
        return
    table = Table(box=None, header_style="bold")
    for title in ("profile", "model", "GPU", "TP", "context", "origin", "made with"):
        table.add_column(title, overflow="fold", no_wrap=title in ("GPU", "TP", "context", "origin"))
    for p in found:
        made = " ".join(v for k, v in p.source.items() if k in ("tool", "version")) or "by hand"
        context = f"{p.context_length:,}" if p.context_length else "?"
        table.add_row(p.name, p.model, p.gpu, " ".join(map(str, p.tp_sizes)), context, f"[italic]{p.origin}[/]", made)
    # In a pipe there is no width to fit.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
