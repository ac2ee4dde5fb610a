"""GPUs over time, by TP and by the tiers they serve: a panel for each policy."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nitsum.sim.result import LayoutAt, RunResult
from nitsum_cli.report.figures import clock
from nitsum_cli.report.style import GREY, framed, hue, lighter

Kind = tuple[tuple[str, ...], int]
"""(tiers, TP); TP 0: in a flip."""
FLIPPING: Kind = ((), 0)
UNUSED = "#B0B0B0"
STEPS_MAX = 1000
PANEL_PX, GAP_PX = 110, 34


def steps(layouts: tuple[LayoutAt, ...], end: float) -> tuple[list[float], dict[Kind, list[float]]]:
    """(where each step begins, GPUs of each kind from there on). More than STEPS_MAX become means over equal parts."""
    kept = [entry for entry in layouts if entry.at < end]
    kinds = sorted({(tiers, tp) for entry in kept for tp, tiers, _ in entry.gpus})
    found: dict[Kind, list[float]] = {k: [0.0] * len(kept) for k in kinds}
    for i, entry in enumerate(kept):
        for tp, tiers, count in entry.gpus:
            found[tiers, tp][i] += count
    starts = [entry.at for entry in kept]
    if len(kept) <= STEPS_MAX:
        return starts, found
    edges = [end * i / STEPS_MAX for i in range(STEPS_MAX + 1)]
    return edges[:-1], {k: _means(starts, values, edges) for k, values in found.items()}


def _means(starts: list[float], values: list[float], edges: list[float]) -> list[float]:
    """Of a step function, over the time between each two edges. Before its first step it is 0."""
    sums, last = [0.0], edges[-1]
    for i, (at, value) in enumerate(zip(starts, values, strict=True)):
        sums.append(sums[-1] + value * ((starts[i + 1] if i + 1 < len(starts) else last) - at))

    def until(t: float) -> float:
        i = bisect_right(starts, t)
        return sums[i - 1] + values[i - 1] * (t - starts[i - 1]) if i else 0.0

    return [(until(b) - until(a)) / (b - a) for a, b in pairwise(edges)]


def _stripes(fill: str, shape: str) -> dict[str, object]:
    return {"shape": shape, "bgcolor": fill, "fgcolor": "#ffffff", "fgopacity": 0.6, "size": 9, "solidity": 0.15} if shape else {}


def layout(results: Mapping[str, RunResult], gpus: int, tiers: list[str]) -> go.Figure:
    """`gpus`: the most there can be. Hue says which tiers, lightness which TP: the darker, the more GPUs work as one.

    A tier alone has its hue of the other pictures; sets of several have those that are left, striped.
    """
    found = {name: steps(r.layouts, r.duration_s) for name, r in results.items()}
    kinds = sorted(
        {k for _, by_kind in found.values() for k in by_kind} - {FLIPPING}, key=lambda k: (len(k[0]), *map(tiers.index, k[0]), k[1])
    )
    hues = {served: hue(i) for i, served in enumerate(dict.fromkeys([*((t,) for t in tiers), *(served for served, _ in kinds if served)]))}
    hues[()] = UNUSED
    tps = sorted({tp for _, tp in kinds})
    shades = {tp: 0.65 * (len(tps) - 1 - i) / max(len(tps) - 1, 1) for i, tp in enumerate(tps)}
    unit, length = clock(max(r.duration_s for r in results.values()))
    body = PANEL_PX * len(found) + GAP_PX * (len(found) - 1)
    figure = make_subplots(len(found), 1, shared_xaxes=True, vertical_spacing=GAP_PX / body if len(found) > 1 else 0)
    legend: set[Kind] = set()
    for row, (name, (starts, by_kind)) in enumerate(found.items(), 1):
        end = results[name].duration_s
        for rank, kind in enumerate((*kinds, FLIPPING)):
            if kind not in by_kind:
                continue
            served, tp = kind
            fill = GREY if kind == FLIPPING else lighter(hues[served], shades[tp])
            label = "in a flip" if kind == FLIPPING else f"TP {tp} · {', '.join(sorted(served, key=tiers.index)) or 'no tier'}"
            figure.add_scatter(
                x=[*(t / length for t in starts), end / length], y=[*by_kind[kind], by_kind[kind][-1]], mode="lines", name=label,
                stackgroup=str(row), legendgroup=label, legendrank=1 + rank, showlegend=kind not in legend, fillcolor=fill,
                fillpattern=_stripes(fill, "x" if kind == FLIPPING else "/" if len(served) > 1 else ""),
                line={"shape": "hv", "width": 0.5, "color": GREY}, hovertemplate="%{y:.4~g} GPUs", row=row, col=1,
            )  # fmt: skip
            legend.add(kind)
        axis = str(row) if row > 1 else ""
        figure.add_annotation(
            x=0, xref="x domain", y=1, yref=f"y{axis} domain", text=f"<b>{name}</b>", showarrow=False, xanchor="left", yanchor="bottom"
        )
        figure.add_hline(y=gpus, line={"dash": "dot", "color": GREY, "width": 1}, row=row, col=1)
        figure.update_yaxes(title_text="GPUs", range=[0, gpus * 1.08], nticks=5, row=row, col=1)
        figure.update_xaxes(range=[0, end / length], row=row, col=1)
    figure.update_xaxes(title_text=f"time ({unit})", row=len(found), col=1)
    names = {"title": {"text": "each GPU works as"}, "traceorder": "normal"}
    return framed(figure, body + 80, hovermode="x unified", legend=names)
