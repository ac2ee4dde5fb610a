"""`nitsum profile`: step times and memory of one model on one GPU type, from kernel tables or from a live engine."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nitsum.errors import InvalidSpec, NitsumError
from nitsum.perf.profile import Profile, dump, parse
from nitsum_cli import measure, modelled


def _tp_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(t) for t in text.split(",") if t.strip()}))
    except ValueError as e:
        raise InvalidSpec("--tp", f"{text!r} is not a list of whole numbers such as 1,2,4,8") from e
    if any(tp < 1 for tp in sizes):
        raise InvalidSpec("--tp", "TP degrees are at least 1")
    return sizes


def command(
    out: Annotated[Path, typer.Option(help="Where to write the profile.")],
    model: Annotated[str, typer.Option(help="The model's name, e.g. meta-llama/Llama-3.1-8B-Instruct.")] = "",
    gpu: Annotated[str, typer.Option(help="GPU type, e.g. h100_sxm.")] = "",
    tp: Annotated[str, typer.Option(help="TP degrees, e.g. 1,2,4,8. Default: each of these that is legal and fits.")] = "",
    config: Annotated[Path | None, typer.Option(help="The model's config.json, where its name is not known.")] = None,
    from_engine: Annotated[str, typer.Option(help="URL of a live, idle SGLang server to measure instead.")] = "",
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the engine's API key.")] = "NITSUM_ENGINE_API_KEY",
    quick: Annotated[bool, typer.Option(help="Measure fewer points, about half a minute.")] = False,
    merge: Annotated[bool, typer.Option(help="Keep the other TP degrees of a profile that is at --out already.")] = False,
) -> None:
    """Write the step-time and memory profile that planner and simulator use."""
    console = Console(stderr=True)
    try:
        if not out.parent.is_dir():
            raise InvalidSpec("--out", f"there is no folder {out.parent}")
        made = _make(console, model, gpu, tp, config, from_engine, api_key_env, quick)
        if merge and out.exists():
            made = merged(made, out)
        out.write_text(dump(made))
    except OSError as e:
        console.print(f"error: --out: {e}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from e
    except NitsumError as e:
        console.print(f"error: {e}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from e
    console.print(
        f"{out}: {made.model} on {made.gpu}, TP {', '.join(map(str, made.tp_sizes))}, {made.origin}", markup=False, soft_wrap=True
    )


def _make(console: Console, model: str, gpu: str, tp: str, config: Path | None, url: str, api_key_env: str, quick: bool) -> Profile:
    say = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    if url:
        if tp:
            raise InvalidSpec("--tp", "an engine has the TP that it was started with; measure each and --merge")
        return measure.profile(url, model, gpu, api_key_env, quick, say)
    for name, value in (("--model", model), ("--gpu", gpu)):
        if not value:
            raise InvalidSpec(name, "is needed, unless --from-engine names a live engine")
    return modelled.profile(model, gpu, _tp_sizes(tp), config, say)


def merged(new: Profile, file: Path) -> Profile:
    """`new`, with the TP degrees that only the profile in `file` has."""
    old = parse(file.read_text(), file.stem)
    if (old.model, old.gpu, old.origin) != (new.model, new.gpu, new.origin):
        raise InvalidSpec("--merge", f"{file} holds {old.model} on {old.gpu} ({old.origin}), not {new.model} on {new.gpu} ({new.origin})")
    return replace(new, tables=old.tables | new.tables)
