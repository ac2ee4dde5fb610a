"""The tables of docs/benchmarks.md, from cells. Every figure is modelled."""

from collections.abc import Iterable

from goodput_cells import Point, Store
from goodput_plans import Plan
from goodput_tables import best, curve, held

SORTS = (("oracle", ("oracle",)), ("best static", ("static-",)), ("best resplit", ("resplit-",)), ("best plain", ("plain-",)))


def _of(names: Iterable[str], starts: tuple[str, ...]) -> list[str]:
    return [n for n in names if n.startswith(starts)]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def _held(plan: Plan, mix: str, names: list[str], share: float, store: Store) -> str:
    """The highest load that the best of them holds."""
    found = [held(curve(plan, mix, n, store), share) for n in names]
    rate, still = max(((r or 0.0, s) for r, s in found), default=(0.0, False))
    return f"{'>= ' if still else ''}{_rate(rate)}" if rate else "-"


def _ratio(mine: float, other: float) -> str:
    if other <= 0:
        return "-"
    return f"{mine / other:.2f}" if mine < 10 * other else f"{mine / other:.0f}"


def ratios(plans: Iterable[Plan], store: Store) -> str:
    """Goodput of `nitsum` by load, attained, and its ratio to the others; the error is of its attainment and the oracle's."""
    heads = ("model", "H100", "mix", "`nitsum`, goodput/s (attained)", *(f"/ {label}" for label, _ in SORTS), "standard error, at most")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for plan in plans:
        for mix in plan.mixes:
            names, points = plan.names(mix), plan.points(mix)
            mine = [store.mean(p, "nitsum", "goodput_rps") for p in points]
            attained = " / ".join(f"{store.mean(p, 'nitsum', 'attainment'):.0%}" for p in points)

            def beside(starts: tuple[str, ...], p: Point, names: tuple[str, ...] = names) -> float:
                return best(_of(names, starts), p, store)[0]

            others = [" / ".join(_ratio(m, beside(s, p)) for m, p in zip(mine, points, strict=True)) for _, s in SORTS]
            errors = [e for p in points for n in ("nitsum", "oracle") if (e := store.error(p, n)) < 1]
            error = f"{max(errors):.1%}" if errors else "one seed"
            own = f"{' / '.join(f'{m:.1f}' for m in mine)} ({attained})"
            lines.append(f"| {plan.model} | {plan.gpus} | {mix} | {own} | {' | '.join(others)} | {error} |")
    return "\n".join(lines)


def loads(plans: Iterable[Plan], store: Store) -> str:
    """Highest load held at 90 % / at 99 %, requests/s."""
    sorts = (("`nitsum`", ("nitsum",)), *SORTS)
    lines = [f"| model | mix | {' | '.join(label for label, _ in sorts)} |", f"|---|---|{'---|' * len(sorts)}"]
    for plan in plans:
        for mix in plan.mixes if len(plan.loads) > 1 else ():
            cells = [[_held(plan, mix, _of(plan.names(mix), s), share, store) for share in (0.9, 0.99)] for _, s in sorts]
            lines.append(f"| {plan.model} | {mix} | {' | '.join(' / '.join(c) for c in cells)} |")
    return "\n".join(lines)
