"""What it costs to give running groups other tiers: nothing restarts, but streams of the tiers that leave run on, and decode in the same
steps as those of the tier that comes. Where that has a stricter TPOT, it misses it until they have ended.
"""

from collections import Counter
from collections.abc import Mapping

from nitsum.demand import TierDemand
from nitsum.planner.answer import Answer
from nitsum.planner.ending import life_s
from nitsum.planner.problem import REACH, Problem
from nitsum.pool import Tier

LASTS_S = 120.0
"""Over which what is lost counts."""


def lost(asked: Problem, tiers: Mapping[str, Tier], demand: Mapping[str, TierDemand], now: Answer, then: Answer) -> float:
    """Score that labels `then` lose to the streams that labels `now` have left behind. A tier that goes short `now` loses nothing."""
    score, wants = 0.0, {w.tier: w for w in asked.wants if now.served[w.pool, w.tier] >= w.target * w.least}
    for c in range(len(asked.classes)):
        was = Counter({k: n for (of, k), n in now.counts.items() if of == c})
        will = Counter({k: n for (of, k), n in then.counts.items() if of == c})
        left = {t for k in was - will for t in asked.kinds[k].tiers}
        for k, n in (will - was).items():
            gone = [tiers[t] for t in left - asked.kinds[k].members if t in tiers]
            for t in asked.kinds[k].tiers:
                if (want := wants.get(t)) is None:
                    continue
                strict = tiers[t].tpot_ms
                slower = [g for g in gone if strict is not None and (g.tpot_ms or strict + 1) > strict]
                part = max((min(life_s(g, demand[g.name]) / LASTS_S, 1.0) for g in slower), default=0.0)
                flow = then.flows.get((k, t), 0.0) * min(want.rate / (then.safe[want.pool, t] or 1.0), 1.0)
                score += part * want.weight * REACH * flow * n / then.groups[k]
    return score
