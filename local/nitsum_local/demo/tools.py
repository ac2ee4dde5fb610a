"""Builders that take minutes, as children that end with the demo."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nitsum_local.binaries import BinariesMissing, needed, under


async def run_module(module: str, words: Sequence[str], say: Callable[[str], None]) -> str:
    """Runs `python -m module words`, hands on its standard error line by line, and returns its standard output.

    Raises RuntimeError with the last lines that it said. Cancelled: its whole process group is killed.
    """
    process = await asyncio.create_subprocess_exec(
        *under(signal.SIGKILL),
        *(sys.executable, "-m", module, *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said: list[str] = []

    async def hand_on(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            said.append(line.decode(errors="replace").rstrip())
            say(said[-1])
            del said[:-20]

    try:
        _, out = await asyncio.gather(hand_on(process.stderr), process.stdout.read())
        if await process.wait():
            raise RuntimeError("\n".join(said) or f"{module} ended with {process.returncode}")
        return out.decode()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def binaries(say: Callable[[str], None]) -> dict[str, Path]:
    """The control plane's, built if they are missing. Raises BinariesMissing."""
    try:
        text = await run_module("nitsum_local.binaries", needed(), say)
    except RuntimeError as e:
        raise BinariesMissing(str(e)) from e
    return {name: Path(path) for name, path in (line.split("\t") for line in text.splitlines())}


async def model(name: str, say: Callable[[str], None]) -> Path:
    """Folder of a checkpoint, unpacked once: `smollm2` or `tiny`."""
    # What the libraries warn about on the way is nothing to a person who watches.
    return Path((await run_module("nitsum_sglang.testing.models", [name], lambda line: None)).strip().splitlines()[-1])
