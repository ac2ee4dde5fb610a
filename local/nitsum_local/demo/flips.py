"""When the engines themselves changed places: read from their own records, so that a pause is measured against what happened."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nitsum_local.demo.traffic import Stream


@dataclass(frozen=True)
class Window:
    """One flip: from the first park to the last wake, monotonic seconds; `before` and `after` are the engines."""

    start: float
    end: float
    before: tuple[str, ...]
    after: tuple[str, ...]


def windows(lines: Iterable[Mapping[str, Any]], since: float) -> list[Window]:
    """`lines`: engines' wake and park records of one node, by time. What happened before `since` (warm-up) does not count."""
    found: list[Window] = []
    parked: list[Mapping[str, Any]] = []
    woken: list[Mapping[str, Any]] = []

    def end() -> None:
        if parked and woken:
            names = tuple(sorted({p["engine"] for p in parked})), tuple(sorted({w["engine"] for w in woken}))
            found.append(Window(parked[0]["t"], woken[-1]["t"], *names))
        parked.clear()
        woken.clear()

    for line in lines:
        if line["t"] < since:
            continue
        if line["event"] == "park":
            if woken:
                end()
            parked.append(line)
        elif parked:
            woken.append(line)
    end()
    return found


def of_pool(lines: Iterable[Mapping[str, Any]], pool: str, since: float) -> list[Window]:
    """Flips of the pool `<namespace>.<name>` alone, node by node: other pools' engines come and go too."""
    by_node: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["engine"].rpartition("-tp")[0] == pool:
            by_node.setdefault(line["gpus"][0].rpartition("-slot-")[0], []).append(line)
    return sorted((w for mine in by_node.values() for w in windows(mine, since)), key=lambda w: w.start)


def overlaps(lines: Iterable[Mapping[str, Any]], died: Mapping[int, float] | None = None) -> list[str]:
    """GPUs on which two engines were awake at once, by their own records by time; empty is what must be.

    `died`: monotonic seconds at which a pid is known to have been killed; a killed engine writes no line, and its time ends there.
    """
    awake: dict[str, tuple[str, int]] = {}
    found: list[str] = []
    for line in lines:
        me = (line["engine"], line["pid"])
        for gpu in line["gpus"]:
            holder = awake.get(gpu)
            if holder is not None and (died or {}).get(holder[1], float("inf")) <= line["t"]:
                holder = None
                del awake[gpu]
            if line["event"] == "wake":
                if holder not in (None, me):
                    found.append(f"{gpu}: {me} woke at {line['t']:.3f} while {holder} was awake")
                awake[gpu] = me
            elif holder == me:
                del awake[gpu]
    return found


def met(streams: Sequence[Stream], flips: Iterable[Window]) -> list[int]:
    """Positions of the streams that were under way when a flip began, those included that never had another token."""
    starts = [w.start for w in flips]
    return [i for i, s in enumerate(streams) if any(s.started < start and (not s.ended or s.ended > start) for start in starts)]


def moved(streams: Iterable[Stream], flips: Iterable[Window]) -> dict[int, float]:
    """By position in `streams`: the widest gap (ms) that a flip made in a stream which had tokens before and after it."""
    result: dict[int, float] = {}
    for i, s in enumerate(streams):
        for w in flips:
            if s.spans(w.start, w.end):
                result[i] = max(result.get(i, 0.0), s.gap_ms(w.start, w.end))
    return result
