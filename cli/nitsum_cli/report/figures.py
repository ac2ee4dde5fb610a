"""Ladder, goodput over time and attainment as Plotly figures."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nitsum.pool import Pool
from nitsum.sim.metrics import goodput_over_time
from nitsum.sim.result import RunResult
from nitsum_cli.report.style import GREY, framed, hue, line

BINS_MAX = 60
BAR_PX, ROOM_PX, LEGEND_PX = 30, 100, 20
MARKED = 0.9
"""The share that people ask for first; the pool's own targets are in the table."""


def html(name: str, figure: go.Figure) -> str:
    # Buttons are named one by one: Plotly's own set has one that uploads the figure to its cloud.
    buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [buttons], "plotlyServerURL": ""}
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=name, config=config)
    return text


def bin_s(duration_s: float) -> float:
    """Equal parts of the duration, about a second long at least: no last part is shorter than the others."""
    return duration_s / min(max(int(duration_s), 1), BINS_MAX)


def lasting(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length * 2 or seconds == length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def clock(duration_s: float) -> tuple[str, float]:
    """(unit of a time axis, seconds in it)"""
    return ("h", 3600.0) if duration_s > 5 * 3600 else ("min", 60.0) if duration_s > 300 else ("s", 1.0)


def ladder(policies: Mapping[str, Any], judged: list[str]) -> go.Figure:
    """A bar for each policy in the order asked for, of what each tier adds.

    `judged`, here and below: the tiers that have an SLO and were offered something; at least one.
    """
    names = list(policies)
    figure = go.Figure()
    for i, tier in enumerate(judged):
        good = [policies[n]["tiers"][tier]["goodput_rps"] or 0.0 for n in names]
        hover = f"%{{y}}<br>{tier}: %{{x:.2f}} requests/s<extra></extra>"
        figure.add_bar(x=good, y=names, orientation="h", name=tier, marker_color=hue(i), hovertemplate=hover)
    offered = max(f["offered_rps"] for f in policies.values())
    right = max(offered, *(f["goodput_rps"] or 0.0 for f in policies.values()))
    texts = [f" <b>{f['goodput_rps']:.2f}</b>  ({f['attainment']:.1%})" for f in policies.values()]
    figure.add_scatter(
        x=[right * 1.005] * len(names), y=names, text=texts, mode="text", textposition="middle right", showlegend=False, hoverinfo="skip"
    )
    figure.add_vline(x=offered, line={"dash": "dash", "color": GREY, "width": 1.5})
    figure.add_annotation(x=offered, y=1, yref="paper", yanchor="bottom", text=f"offered {offered:.2f}", showarrow=False)
    return framed(
        figure,
        ROOM_PX + max(BAR_PX * len(names), LEGEND_PX * (len(judged) + 2)),
        barmode="stack",
        bargap=0.3,
        legend={"title": {"text": "tier"}, "traceorder": "normal"},
        xaxis={"title": {"text": "goodput (requests/s within every SLO)"}, "range": [0, right * 1.2]},
        yaxis={"autorange": "reversed", "automargin": True, "showgrid": False, "ticks": ""},
    )


def goodput(pool: Pool, results: Mapping[str, RunResult], tiers: list[str]) -> go.Figure:
    """All tiers together, then each; what was offered behind."""
    first = next(iter(results.values()))
    width = bin_s(first.duration_s)
    series = {name: goodput_over_time(pool, r, width) for name, r in results.items()}
    rows = [("all tiers with an SLO", tiers), *((t, [t]) for t in tiers)] if len(tiers) > 1 else [(tiers[0], tiers)]
    unit, length = clock(first.duration_s)
    heights = [200, *[130] * (len(rows) - 1)]
    figure = make_subplots(len(rows), 1, shared_xaxes=True, vertical_spacing=34 / sum(heights), row_heights=heights)
    for i, (title, shown) in enumerate(rows, 1):
        for j, (name, by_tier) in enumerate(series.items()):
            cells = list(zip(*(by_tier[t] for t in shown), strict=True))
            x = [(at[0][0] + width / 2) / length for at in cells]
            if j == 0:
                offered = [sum(c[1] for c in at) for at in cells]
                dotted = {"color": GREY, "width": 1, "dash": "dot"}
                group = {"name": "offered", "legendgroup": "offered", "showlegend": i == 1}
                figure.add_scatter(x=x, y=offered, line=dotted, fill="tozeroy", fillcolor="rgba(128,128,128,0.15)", **group, row=i, col=1)
            group = {"name": name, "legendgroup": name, "showlegend": i == 1}
            figure.add_scatter(x=x, y=[sum(c[2] for c in at) for at in cells], mode="lines", line=line(j), **group, row=i, col=1)
        figure.update_yaxes(title_text="requests/s", rangemode="tozero", row=i, col=1)
        figure.add_annotation(
            x=0, xref="x domain", y=1, yref=f"y{i} domain" if i > 1 else "y domain", text=f"<b>{title}</b>", showarrow=False,
            xanchor="left", yanchor="bottom",
        )  # fmt: skip
    figure.update_xaxes(range=[0, first.duration_s / length])
    figure.update_xaxes(title_text=f"time of arrival ({unit})", row=len(rows), col=1)
    figure.update_traces(hovertemplate="%{y:.2f}/s")
    return framed(figure, sum(heights) + 34 * len(rows) + 60, hovermode="x unified", legend={"title": {"text": "policy"}})


def attainment(policies: Mapping[str, Any], judged: list[str]) -> go.Figure:
    """A column of bars for each tier, so that policies are read down and tiers across."""
    names = list(policies)
    figure = make_subplots(1, len(judged), shared_yaxes=True, horizontal_spacing=0.03)
    for i, tier in enumerate(judged):
        shares = [policies[n]["tiers"][tier]["attainment"] for n in names]
        figure.add_bar(
            x=[None if s is None else s * 100 for s in shares], y=names, orientation="h", marker_color=hue(i), showlegend=False,
            text=["" if s is None else f"{s:.1%}" for s in shares], textposition="outside", cliponaxis=False,
            hovertemplate=f"%{{y}}<br>{tier}: %{{x:.2f}} %<extra></extra>", row=1, col=i + 1,
        )  # fmt: skip
        figure.add_vline(x=MARKED * 100, line={"dash": "dot", "color": GREY, "width": 1}, row=1, col=i + 1)
        axis = f"x{i + 1}" if i else "x"
        figure.add_annotation(
            x=0, xref=f"{axis} domain", y=1, yref="paper", text=f"<b>{tier}</b>", showarrow=False, xanchor="left", yanchor="bottom"
        )
        figure.update_xaxes(title_text="attainment (%)", row=1, col=i + 1)
    figure.update_xaxes(range=[0, 125], tickvals=[0, 25, 50, 75, 100])
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure = framed(figure, ROOM_PX + BAR_PX * len(names), bargap=0.3)
    return figure.update_yaxes(showgrid=False, ticks="")
