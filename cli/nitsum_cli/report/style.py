"""Colours and frames of all pictures. Two palettes that the colour-blind tell apart, so that a tier and a policy are never one colour:
Okabe and Ito's for tiers, Tol's bright one for policies. Order, labels and dashes repeat what colour says.

Text must suit a light and a dark page: its colour comes from the page's style sheet.
"""

from typing import Any

import plotly.graph_objects as go

TIERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#B8A800", "#D55E00")
POLICIES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#808080"
GRID = "rgba(128,128,128,0.25)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def hue(i: int) -> str:
    return TIERS[i % len(TIERS)]


def line(i: int) -> dict[str, Any]:
    """Of the i-th policy."""
    return {"color": POLICIES[i % len(POLICIES)], "dash": DASHES[i // len(POLICIES) % len(DASHES)], "width": 1.8}


def lighter(hex_colour: str, share: float) -> str:
    """Mixed with white; share 0 leaves it as it is."""
    parts = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(p + (255 - p) * share):02x}" for p in parts)


def framed(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 20, "t": 30, "b": 50},
        font={"family": FONT, "size": 13, "color": GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff", "family": FONT}},
        legend={"bgcolor": "rgba(0,0,0,0)"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": TIERS[4]},
    )
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "showline": True,
        "title_font_size": 13,
        "ticks": "outside",
        "tickcolor": GRID,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(**layout)
    return figure
