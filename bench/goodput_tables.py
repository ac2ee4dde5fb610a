"""From cells to the tables of `goodput.py`, as data and as rich tables. Every figure is modelled."""

from collections.abc import Iterable
from typing import Any

from goodput_cells import Point, Store
from goodput_plans import Plan
from rich.table import Table

PAPER = (13.2, 16.7, 17.2, 28.0, 0.0, 33.3)
RUNGS = (
    ("plain engine", "plain-"),
    ("SLO-aware, best static TP", "aware-"),
    ("tiers apart", "apart"),
    ("our scheduler", "static-partition"),
    ("dynamic TP by restart", "restart-tp"),
    ("full", "nitsum"),
)
STATIC = ("static-",)


def held(curve: list[tuple[float, float]], share: float) -> tuple[float | None, bool]:
    """(highest rate up to which the share is attained, between two points on their line; whether the last point still holds).

    `curve`: (rate, attainment) by rate. None: not even the first point holds.
    """
    best: float | None = None
    for i, (rate, attained) in enumerate(curve):
        if attained < share:
            if i:
                before, was = curve[i - 1]
                best = before + (rate - before) * (was - share) / (was - attained)
            return best, False
        best = rate
    return best, best is not None


def curve(plan: Plan, mix: str, name: str, store: Store) -> list[tuple[float, float]]:
    points = {*plan.points(mix), *plan.lower(mix, name, store)}
    rows = [p for p in points if any(store.seeds(p, name))]
    return sorted((store.mean(p, name, "offered_rps"), store.mean(p, name, "attainment")) for p in rows)


def best(names: Iterable[str], point: Point, store: Store) -> tuple[float, str]:
    """(most goodput of them, whose): in hindsight, at this load."""
    return max(((store.mean(point, n, "goodput_rps"), n) for n in names), default=(0.0, ""))


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 3) if b > 0 else None


def table_of(plan: Plan, mix: str, store: Store) -> dict[str, Any]:
    """Goodput and attainment by policy and load, loads held, ratios."""
    names = plan.names(mix)
    rows = {}
    for n in names:
        line = curve(plan, mix, n, store)
        rows[n] = {
            "goodput_rps": [round(store.mean(p, n, "goodput_rps"), 3) for p in plan.points(mix)],
            "attainment": [round(store.mean(p, n, "attainment"), 4) for p in plan.points(mix)],
            "held_90_rps": held(line, 0.9),
            "held_99_rps": held(line, 0.99),
            "curve": line,
        }
    found: dict[str, Any] = {
        "loads": plan.loads,
        "policies": rows,
        "seeds": [len(list(store.seeds(p, names[0]))) for p in plan.points(mix)],
    }
    errors = [store.error(p, n) for p in plan.points(mix) for n in names]
    found["error_max"] = max((e for e in errors if e < 1), default=None)
    if "nitsum" in names:
        found["ratios"] = ratios(plan, mix, names, store)
    return found


def ratios(plan: Plan, mix: str, names: tuple[str, ...], store: Store) -> dict[str, Any]:
    """`least`: the worst over loads; the others at the highest load of the grid that nitsum holds at 90 %."""
    of = lambda *starts: [n for n in names if n.startswith(starts)]  # noqa: E731
    points = plan.points(mix)
    mine = {p: store.mean(p, "nitsum", "goodput_rps") for p in points}
    oracle = [mine[p] / store.mean(p, "oracle", "goodput_rps") for p in points if store.mean(p, "oracle", "attainment") >= 0.95]
    static = [(mine[p] / good, who) for p in points if (good := (b := best(of(*STATIC), p, store))[0]) > 0 and (who := b[1])]
    holds = [p for p in points if store.mean(p, "nitsum", "attainment") >= 0.9]
    at = max(holds, key=lambda p: p.load, default=None)
    found: dict[str, Any] = {
        "oracle_least": round(min(oracle), 3) if oracle else None,
        "static_least": round(min(static)[0], 3) if static else None,
        "static_best": min(static)[1] if static else None,
        "at_rps": round(at.rate, 2) if at else None,
    }
    for label, starts in (("static", STATIC), ("resplit", ("resplit-",)), ("plain", ("plain-",))):
        good, who = best(of(*starts), at, store) if at else (0.0, "")
        found[label] = (_ratio(mine[at], good) if at else None, who)
    return found


def _load(value: tuple[float | None, bool]) -> str:
    return "-" if value[0] is None else f"{'>= ' if value[1] else ''}{value[0]:.1f}"


def show(plan: Plan, mix: str, data: dict[str, Any], origin: str) -> Table:
    title = f"{plan.model}, {plan.gpus} H100, {mix}: goodput, requests/s (attained) by offered requests/s; modelled, {origin}"
    rates = [f"{p.rate:.1f}" for p in plan.points(mix)]
    table = Table("policy", *rates, "held at 90 %", "held at 99 %", title=title)
    for name, row in data["policies"].items():
        cells = [f"{g:.1f} ({a:.0%})" for g, a in zip(row["goodput_rps"], row["attainment"], strict=True)]
        table.add_row(name, *cells, _load(row["held_90_rps"]), _load(row["held_99_rps"]))
    return table


def summary(found: list[tuple[Plan, str, dict[str, Any]]]) -> Table:
    def text(value: Any) -> str:
        if isinstance(value, tuple | list):
            return "-" if value[0] is None else f"{value[0]:.2f} ({value[1]})"
        return "-" if value is None else str(value)

    table = Table(
        *("model", "H100", "mix", "nitsum / oracle, least where it attains 95 %", "nitsum / best static, least", "requests/s held at 90 %"),
        *("there: / best resplit", "/ best plain", "standard error at most"),
        title="nitsum beside the others (modelled); wanted: 0.95, 0.98, -, 1.2 with a strict tier, (paper) up to 5.3",
    )
    for plan, mix, data in found:
        r = data["ratios"]
        error = "one seed" if data["error_max"] is None else f"{data['error_max']:.1%}"
        static = "-" if r["static_least"] is None else f"{r['static_least']} ({r['static_best']})"
        cells = (text(r["oracle_least"]), static, text(r["at_rps"]), text(r["resplit"]), text(r["plain"]), error)
        table.add_row(plan.model, str(plan.gpus), mix, *cells)
    return table


def even(plan: Plan, store: Store) -> tuple[dict[str, Any], Table]:
    """Goodput against what a flip costs."""
    data: dict[str, Any] = {}
    table = Table(
        "flip",
        *(f"{mix}: goodput/s (attained), flips" for mix in plan.mixes),
        title=f"Break-even: {plan.model}, {plan.gpus} H100, load 1; modelled",
    )
    for name in plan.names(plan.mixes[0]):
        cells = []
        for mix in plan.mixes:
            (point,) = plan.points(mix)
            mean = {what: round(store.mean(point, name, what), 4) for what in ("goodput_rps", "attainment", "flips")}
            data.setdefault(mix, {})[name] = mean
            cells.append(f"{mean['goodput_rps']:.2f} ({mean['attainment']:.1%}), {mean['flips']:.0f}")
        table.add_row("nitsum (from the profile, KV recomputed)" if name == "nitsum" else name, *cells)
    return data, table


def ladder(plan: Plan, store: Store) -> tuple[dict[str, Any], Table]:
    """The paper's rungs on each mix: of a rung with several TPs the best in hindsight."""
    (rate,) = {plan.points(mix)[0].rate for mix in plan.mixes}
    title = f"The ladder: {plan.model}, {plan.gpus} H100, {rate:.0f} requests/s offered: goodput, requests/s (policy); modelled"
    table = Table("rung", *plan.mixes, "the paper measured, its own traffic", title=title)
    data: dict[str, Any] = {mix: [] for mix in plan.mixes}
    for (rung, start), paper in zip(RUNGS, PAPER, strict=True):
        cells = []
        for mix in plan.mixes:
            (point,) = plan.points(mix)
            good, who = best([n for n in plan.names(mix) if n.startswith(start)], point, store)
            data[mix].append({"rung": rung, "policy": who, "goodput_rps": round(good, 3), "paper_rps": paper})
            cells.append(f"{good:.1f} ({who})")
        table.add_row(rung, *cells, f"{paper:g}")
    return data, table
