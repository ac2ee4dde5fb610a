"""An answer to a Problem and what it is worth, by which exact and greedy answers are compared, and when it replaces another."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nitsum.planner.problem import REACH, REST, Counts, Problem


@dataclass(frozen=True)
class Answer:
    """`served` and `safe` requests/s by (pool, tier), `safe` with the capacity left for surges; `flows` by (kind index, tier).
    `by`: which solver."""

    counts: Counts
    score: float
    served: Mapping[tuple[str, str], float]
    safe: Mapping[tuple[str, str], float]
    flows: Mapping[tuple[int, str], float]
    by: str
    note: str = ""

    @cached_property
    def groups(self) -> Mapping[int, int]:
        """By kind index, of all classes."""
        found: dict[int, int] = {}
        for (_, k), n in self.counts.items():
            found[k] = found.get(k, 0) + n
        return found


def value(problem: Problem, counts: Counts, by: str, note: str = "") -> Answer:
    """Score of `counts`, flows filled greedily. Never above the optimum of the flow problem.

    First what earns most per group, less where others serve the tier with fewer GPUs: a wide group is better at everything, and shall do
    what it is better at by most.
    """
    groups: dict[int, float] = {}
    for (_, k), n in counts.items():
        groups[k] = groups.get(k, 0.0) + n
    left = {k: float(n) for k, n in groups.items()}
    served = {(w.pool, w.tier): 0.0 for w in problem.wants}
    safe = dict(served)
    flows: dict[tuple[int, str], float] = {}
    score = -problem.switch_loss(counts)
    pieces = {(w.pool, w.tier): [list(piece) for piece in w.pieces()] for w in problem.wants}
    ways = []
    for w in problem.wants:
        able = [(k, problem.kinds[k], problem.kinds[k].rate(w.tier)) for k in groups if problem.kinds[k].pool == w.pool]
        most = max((rate / kind.tp_size for _, kind, rate in able), default=0.0)
        for k, kind, rate in able:
            if rate > 0:
                part = rate / kind.tp_size / most
                for piece, (_, worth) in enumerate(w.pieces()):
                    ways.append((-worth * rate * part, len(kind.tiers), w.pool, w.tier, piece, k, rate))
    for _, _, pool, tier, piece, k, rate in sorted(ways):
        need, worth = pieces[pool, tier][piece]
        got = min(need, left[k] * rate)
        if got > 1e-12:
            left[k] -= got / rate
            pieces[pool, tier][piece][0] -= got
            safe[pool, tier] += got
            flows[k, tier] = flows.get((k, tier), 0.0) + got
            score += worth * got
    for w in problem.wants:
        served[w.pool, w.tier] = min(safe[w.pool, w.tier], w.rate)
    return Answer(dict(counts), score, served, safe, flows, by, note)


def holding(problem: Problem, answer: Answer) -> set[tuple[str, str]]:
    """(pool, tier) of which the target share of all that is planned for is served."""
    return {(w.pool, w.tier) for w in problem.wants if answer.served[w.pool, w.tier] >= w.target * w.rate * (1 - 1e-9)}


SHORT = 0.95
"""A tier of which less is served is short of groups."""
LESS = 0.5
"""Part of what is lacking that a change must bring, to count for those that are short."""


def lack(problem: Problem, answer: Answer) -> float:
    """Worth of the demand that is not served, of tiers that are short."""
    lost = 0.0
    for w in problem.wants:
        if (got := answer.served[w.pool, w.tier]) < SHORT * w.least:
            reached = max(w.target * w.least - got, 0.0)
            lost += w.weight * (REACH * reached + REST * (w.least - max(got, w.target * w.least)))
    return lost


def wins(problem: Problem, best: Answer, stays: Answer, gain_min: float) -> bool:
    """Whether `best` replaces `stays`: it earns more by `gain_min`, or takes enough from what tiers lack that are short. The latter,
    since a tier with few requests or little weight would never be worth a part of the whole."""
    return more(best.score, stays.score, gain_min, lack(problem, stays), lack(problem, best))


def more(score: float, before: float, gain_min: float, lacked: float, lacks: float) -> bool:
    """`wins` in numbers."""
    if score <= before + 1e-9:
        return False
    return score > before + gain_min * abs(before) or (lacked > 0 and lacked - lacks > LESS * lacked)
