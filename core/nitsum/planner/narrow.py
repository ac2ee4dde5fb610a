"""Fewer tiers on groups that are shared, where little of a tier would flow through them: routers know no flows, only who may."""

import math
from collections import Counter
from dataclasses import replace

from nitsum.planner.answer import Answer, holding, value
from nitsum.planner.problem import Problem, Want

EVEN_MIN = 0.75
"""Of a tier's mean flow per group: a kind through whose groups less flows is not meant for it."""
LEFT_MIN = 0.1
"""Of a tier's demand: where less than this shall flow, no group that others share is meant for it, whatever that costs: what comes all the
same would break what they hold."""
NARROWED_LOSS = 0.05
"""Of the score that may be given up for that."""


def narrowed(asked: Problem, answer: Answer) -> Answer:
    """Routers spread a tier evenly over all groups that are meant for it. Where much less of it shall flow than that, the group is not: its
    other tiers would pay for what comes too much. One tier of one kind after the other, the least wanted first. Groups that no demand needs
    stay as they are."""
    index = {(k.shape, k.tiers): i for i, k in enumerate(asked.kinds)}
    only = replace(asked, wants=tuple([Want(w.pool, w.tier, w.rate, w.target, w.weight, 1.0) for w in asked.wants]))
    least = (1 - NARROWED_LOSS) * answer.score
    tried: set[tuple[int, int]] = set()
    while True:
        flows = value(only, answer.counts, "").flows
        groups = answer.groups
        found: list[tuple[float, int, int]] = []
        for tier in {t for _, t in flows}:
            through = {k: flows.get((k, tier), 0.0) for k in groups if asked.kinds[k].rate(tier) > 0}
            mean = sum(through.values()) / sum(groups[k] for k, flow in through.items() if flow > 0)
            for k, flow in through.items():
                fewer = index.get((asked.kinds[k].shape, tuple(t for t in asked.kinds[k].tiers if t != tier)))
                used = any((k, t) in flows for t in asked.kinds[k].tiers)
                if used and fewer is not None and (k, fewer) not in tried and flow < EVEN_MIN * mean * groups[k]:
                    found.append((flow / mean / groups[k], k, fewer))
        through_all: Counter[str] = Counter()
        for (_, t), flow in flows.items():
            through_all[t] += flow  # type: ignore[assignment]
        flowing = {w.tier for w in asked.wants if through_all[w.tier] >= LEFT_MIN * w.rate}
        for k in groups:  # what comes of it all the same goes to one group, not to all (`_sheltered`)
            for tier in asked.kinds[k].tiers if len(asked.kinds[k].tiers) > 1 else ():
                fewer = index.get((asked.kinds[k].shape, tuple(t for t in asked.kinds[k].tiers if t != tier)))
                if tier not in flowing and fewer is not None and (k, fewer) not in tried:
                    found.append((-1.0, k, fewer))
        if not found:
            return answer
        part, k, fewer = min(found)
        tried.add((k, fewer))
        narrower = _without(asked, answer, k, fewer)
        if part < 0 or (narrower.score >= least and holding(asked, narrower) >= holding(asked, answer)):
            answer = narrower
            continue
        (tier,) = asked.kinds[k].members - asked.kinds[fewer].members
        alone = index.get((asked.kinds[k].shape, (tier,)))
        if alone is not None and (rate := asked.kinds[alone].rate(tier)) > 0:
            whole = math.ceil(flows.get((k, tier), 0.0) / rate - 1e-9)
            narrower = _without(asked, answer, k, fewer, alone, whole)
            if 0 < whole < groups[k] and narrower.score >= least and holding(asked, narrower) >= holding(asked, answer):
                answer = narrower


def _without(asked: Problem, answer: Answer, k: int, fewer: int, alone: int = 0, whole: int = 0) -> Answer:
    """Groups of one kind are of another with a tier less, but for some that are the tier's alone."""
    counts: Counter[tuple[int, int]] = Counter()
    for (c, of), n in answer.counts.items():
        own = min(whole, n) if of == k else 0
        whole -= own
        counts[c, fewer if of == k else of] += n - own
        counts[c, alone] += own
    return value(asked, {at: n for at, n in counts.items() if n}, answer.by)
