"""What a new layout was chosen over: each TP alone, and tiers with or without groups of their own, each as `solve` finds it."""

from collections.abc import Callable
from dataclasses import replace

from nitsum.layout import Role
from nitsum.planner.answer import Answer, value
from nitsum.planner.problem import Kind, Problem
from nitsum.planner.question import PoolQuestion
from nitsum.planner.rating import apart, rated
from nitsum.planner.words import describe, goodput

SHOWN_MAX = 4
"""Of a pool; the best first."""


def _of_one_tp(asked: Problem, pool: str, tp_size: int) -> Problem:
    """The same question where the pool has groups of this TP only, each of which does both."""

    def able(k: Kind) -> bool:
        return k.pool != pool or (k.tp_size == tp_size and k.split is None)

    return replace(asked, kinds=tuple(k if able(k) else replace(k, rates=(0.0,) * len(k.rates)) for k in asked.kinds))


def _apart(asked: Problem, pool: str) -> Problem:
    """The same question where the pool's groups are not shared."""
    return replace(asked, kinds=tuple(a if k.pool == pool else k for k, a in zip(asked.kinds, apart(asked).kinds, strict=True)))


def _lacks(asked: Problem, answer: Answer, pool: str) -> str:
    """Of which tier the least part of its demand is served, if some is not."""
    served = {w.tier: answer.served[w.pool, w.tier] / w.rate for w in asked.wants if w.pool == pool and w.rate > 0}
    worst = min(served, key=lambda t: (served[t], t), default="")
    return f", {worst} {served[worst]:.2f}x" if worst and served[worst] < 1 - 1e-6 else ""


def _parts(kind: Kind) -> list[tuple[Role, int]]:
    return [(Role.MIXED, kind.tp_size)] if kind.split is None else list(kind.split.parts())


def _said(asked: Problem, answer: Answer, pool: str) -> str:
    return describe([part for k, n in answer.groups.items() if (kind := asked.kinds[k]).pool == pool for part in _parts(kind) * n])


def alternatives(asked: Problem, chosen: Answer, layout: str, q: PoolQuestion, solve: Callable[[Problem], Answer]) -> tuple[str, ...]:
    """One sentence each: layout, expected goodput, the tier that lacks most, and how much lower it scores. `layout`: what was chosen.
    `solve`: greedy will do."""
    pool = q.pool.name
    found, known = list[tuple[float, str]](), {_said(asked, chosen, pool), layout}
    for question, how in (*((_of_one_tp(asked, pool, tp), "") for tp in q.tps), (_apart(asked, pool), ", no group shared"), (asked, "")):
        answer = solve(question)
        answer = rated(asked, value(asked, answer.counts, answer.by))
        other = _said(asked, answer, pool)
        if answer.counts and other not in known:
            known.add(other)
            less = 1 - answer.score / chosen.score if chosen.score > 0 else 0.0
            score = f"scores {less:.1%} less by target and weight" if less >= 0 else "no better once its groups are labelled"
            expected = f"expected goodput {goodput(q, asked, answer):.2f} requests/s{_lacks(asked, answer, pool)}"
            found.append((-answer.score, f"{other}{how}: {expected}; {score}"))
    return tuple(text for _, text in sorted(found)[:SHOWN_MAX])
