"""The live terminal view: pool, layout, streams, flips. Where the output is no terminal, a line per change instead."""

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nitsum_local.demo.phases import Phase
from nitsum_local.demo.traffic import Stream
from nitsum_local.demo.watch import PoolWatch

TRANSIENT = ("a flip is running", "cooling down", "no fresh demand report")
"""How reasons begin that only hold a decision up for a moment: the view goes on showing the one before."""
COLOURS = {1: "cyan", 2: "green", 3: "magenta", 4: "yellow"}


def layout_picture(layout: str) -> Text:
    """`3xTP1` as three boxes, `1xTP3` as one that is three wide."""
    text = Text()
    for part in layout.split():
        count, _, tp = part.partition("xTP")
        if not (count.isdigit() and tp.isdigit()):
            continue
        for _ in range(int(count)):
            label = f"TP{tp}".center(8 * int(tp) - 2)
            text.append(f"[{label}]", style=f"bold {COLOURS.get(int(tp), 'white')}")
            text.append(" ")
    return text if text.plain else Text("no layout yet", style="dim")


def lasting(reasons: Sequence[str], shown: str) -> str:
    """The last reason of the plan; `shown` goes on where that is a transient hold."""
    return shown if not reasons or reasons[-1].startswith(TRANSIENT) else reasons[-1]


class View:
    """`render()` is the picture of now; `say()` prints a line above it."""

    def __init__(self, console: Console, tiers: Sequence[str]) -> None:
        self.console, self.tiers = console, tuple(tiers)
        self.began = time.monotonic()
        self.phase, self.headline = Phase.PREFLIGHT, ""
        self.watch: PoolWatch | None = None
        self.streams: list[Stream] = []
        self._last, self._told, self._reason = "", 0, ""

    def say(self, line: str) -> None:
        self.console.print(Text(f"{time.monotonic() - self.began:6.1f} s  {line}"), soft_wrap=True)

    def enter(self, phase: Phase, headline: str) -> None:
        self.phase, self.headline = phase, headline
        self.say(f"{phase}: {headline}")

    def progress(self, line: str) -> None:
        """What goes on while one waits: the picture's foot in a terminal, a line elsewhere."""
        if self.console.is_terminal:
            self.headline = line
        else:
            self.say(line)

    def note_changes(self) -> None:
        """A line per change of the pool's layout and per stream that failed."""
        for s in self.streams[self._told :]:
            if not s.ended:
                break
            self._told += 1
            if s.error:
                self.say(f"a stream of {s.tier} failed: {s.error[:200]}")
        if self.watch is None or not (layout := self.watch.status.get("layout")):
            return
        if layout != self._last:
            self.say(f"layout {self._last or 'none'} -> {layout}")
            self._last = layout

    def render(self) -> RenderableType:
        status = self.watch.status if self.watch is not None else {}
        pool = Table(expand=True, box=None, header_style="bold")
        for name in ("NAME", "GPUS", "LAYOUT", "ATTAINMENT", "GOODPUT", "READY", "REASON"):
            pool.add_column(name, no_wrap=True)
        if self.watch is not None:
            ready = self.watch.condition("Ready").get("status", "")
            gpus = (status.get("gpus") or {}).get("summary", "")
            cells = (gpus, status.get("layout"), status.get("attainment"), status.get("goodput"), ready, status.get("reason"))
            pool.add_row(self.watch.name, *(str(c or "") for c in cells))
        self._reason = lasting((status.get("plan") or {}).get("reasons") or [], self._reason)
        parts: list[RenderableType] = [
            pool,
            Text.assemble("\n layout  ", layout_picture(status.get("layout") or "")),
            Text(f" plan    {self._reason}", style="dim"),
            self._streams(),
            self._flips(),
        ]
        return Panel(Group(*parts), title=f"nitsum demo: {self.phase}", subtitle=f"{self.headline} · {time.monotonic() - self.began:.0f} s")

    def _streams(self) -> Table:
        table = Table(expand=True, box=None, header_style="bold")
        for name in ("TIER", "LIVE", "DONE", "FAILED", "TTFT p50", "TPOT p50"):
            table.add_column(name)
        for tier in self.tiers:
            mine = [s for s in self.streams if s.tier == tier]
            done = [s for s in mine if s.ended]
            ttft = _median([(s.times[0] - s.started) * 1e3 for s in mine[-20:] if s.times])
            tpot = _median([(s.times[-1] - s.times[0]) * 1e3 / (len(s.times) - 1) for s in mine[-20:] if len(s.times) > 1])
            failed = sum(bool(s.error) for s in done)
            table.add_row(tier, str(len(mine) - len(done)), str(len(done)), str(failed), ttft, tpot)
        return table

    def _flips(self) -> Table:
        table = Table(expand=True, box=None, header_style="bold")
        for name in ("FLIP AT", "FROM", "TO", "STREAMS MOVED", "OUTCOME"):
            table.add_column(name)
        for f in (self.watch.status.get("lastFlips") or [])[:4] if self.watch is not None else []:
            table.add_row(f.get("time", ""), f.get("from", ""), f.get("to", ""), str(f.get("streamsMoved", "")), f.get("outcome", ""))
        return table


def _median(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.0f} ms" if values else ""
