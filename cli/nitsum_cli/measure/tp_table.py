"""The table of one TP degree: every point that the engine takes is measured, the others are computed from those."""

import asyncio
from collections.abc import Callable

from nitsum.errors import InvalidSpec
from nitsum.perf.tables import TpTable
from nitsum_cli.measure.door import DOOR_MOST, doors_ms
from nitsum_cli.measure.engine import Engine, Facts
from nitsum_cli.measure.points import KV_SHARE, STEPS, STEPS_MAX, Points
from nitsum_cli.measure.steps import decode_ms, prefill_ms
from nitsum_cli.smooth import monotone

Say = Callable[[str], None]


def filled(cells: list[list[float | None]], xs: tuple[int, ...]) -> tuple[list[list[float]], int]:
    """(every cell, how many were computed): what a column adds to the first one grows with x. The first column is whole."""
    out, count = [], 0
    for i, row in enumerate(cells):
        first = row[0]
        assert first is not None, "the first column is measured"
        line = [first]
        for j, value in enumerate(row[1:], 1):
            if value is None:
                count += 1
                # The largest x that has this column; there is one, or the column would not be here.
                k = max(n for n in range(len(cells)) if cells[n][j] is not None)
                there, base = cells[k][j], cells[k][0]
                assert there is not None
                assert base is not None
                value = first + (there - base) * xs[i] / xs[k]
            line.append(value)
        out.append(line)
    return out, count


def _measured_columns(cells: list[list[float | None]], ys: tuple[int, ...]) -> tuple[list[list[float | None]], tuple[int, ...]]:
    """Without the columns in which nothing could be measured."""
    keep = [j for j in range(len(ys)) if any(row[j] is not None for row in cells)]
    return [[row[j] for j in keep] for row in cells], tuple(ys[j] for j in keep)


async def table(engine: Engine, facts: Facts, points: Points, say: Say) -> tuple[TpTable, int]:
    """And the number of cells that were computed."""
    room = int(facts.kv_tokens * KV_SHARE)
    chunks = tuple(c for c in points.chunks if c <= min(facts.prompt_max, facts.chunk_max))
    batches = tuple(b for b in points.batches if b <= facts.running_max and b * (points.contexts[0] + STEPS) <= room)
    contexts = tuple(c for c in points.contexts if c == points.contexts[0] or c <= facts.prompt_max)
    if not chunks or not batches:
        raise InvalidSpec("--from-engine", f"its KV of {facts.kv_tokens} tokens is too small to measure anything")
    await engine.flush()
    for _ in range(2):  # the first requests compile and allocate
        await asyncio.gather(*(engine.stream(engine.prompt(points.contexts[0]), 4) for _ in range(min(4, batches[-1]))))
    columns: list[list[float | None]] = []
    kept = tuple(c for c in points.cached if c + chunks[0] <= facts.prompt_max)
    for cached in kept:
        prefix = engine.prompt(cached)
        if prefix:
            await engine.first_token(prefix)
        column = []
        for chunk in chunks:
            fits = cached + chunk <= facts.prompt_max
            column.append(await prefill_ms(engine, chunk, prefix, points.repeats) if fits else None)
        columns.append(column)
        say(f"prefill behind {cached}: " + ", ".join(f"{c}: {ms:.1f} ms" for c, ms in zip(chunks, column, strict=True) if ms is not None))
    at_once, door_ms = await doors_ms(engine, chunks[len(chunks) // 2], contexts[0], points.repeats)
    say(f"outside the engine's steps: {at_once:.1f} ms of these, {door_ms:.1f} ms in traffic")
    columns = [[ms if ms is None else max(ms - at_once, ms * (1 - DOOR_MOST)) for ms in column] for column in columns]
    cells = [list(row) for row in zip(*columns, strict=True)]
    cells, kept = _measured_columns(cells, kept)
    prefill, computed = filled(cells, chunks)
    decodes: list[list[float | None]] = []
    for batch in batches:
        row: list[float | None] = []
        for ctx in contexts:
            fits = batch * (ctx + STEPS_MAX) <= room or (ctx == contexts[0] and batch * (ctx + STEPS) <= room)
            row.append(await decode_ms(engine, batch, ctx, points.repeats) if fits else None)
        if row[0] is None:
            break  # the engine does not run that many together
        decodes.append(row)
        say(f"decode {batch} at " + ", ".join(f"{c}: {ms:.1f} ms" for c, ms in zip(contexts, row, strict=True) if ms is not None))
    if not decodes:
        raise InvalidSpec("--from-engine", "no decode step could be timed: its streams end before they begin; is it busy?")
    batches = batches[: len(decodes)]
    decodes, contexts = _measured_columns(decodes, contexts)
    decode, more = filled(decodes, batches)
    await engine.flush()
    smooth_decode, _ = monotone(decode)
    smooth_prefill, _ = monotone(prefill)
    axes = [tuple(map(float, axis)) for axis in (batches, contexts, chunks, kept)]
    first = tuple(r[0] for r in smooth_prefill)
    behind, rows = (axes[3], smooth_prefill) if len(kept) > 1 else ((), ())
    return TpTable(axes[0], axes[1], smooth_decode, axes[2], first, facts.kv_tokens, behind, rows, None, door_ms), computed + more
