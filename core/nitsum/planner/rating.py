"""What an answer is worth when it counts that a lightly loaded group meets more than the target share of its requests.

The search takes a group for good up to its safe rate. Where several answers serve all that is asked for, it cannot tell one whose tiers
just reach their shares from one where hardly a request misses: that is told here, of answers that are found.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from nitsum.planner.answer import Answer
from nitsum.planner.problem import Kind, Problem


def met(kind: Kind, used: float, tier: str) -> float:
    """Share of the requests of a tier alone that meet their targets where they take this part of a group's time."""
    half, whole = kind.attained[kind.tiers.index(tier)]
    return half + (whole - half) * (2 * used - 1) if used > 0.5 else 1 - (1 - half) * 2 * used


def _missing(asked: Problem, answer: Answer, rates: Mapping[tuple[str, str], float]) -> Iterator[tuple[str, float, dict[str, float]]]:
    """(pool, share missed, requests/s by tier) of the groups of each kind, where so much of each tier comes.

    Tiers that share a group miss together, each as much as those that take its time make it: their misses weigh by the time they take.
    """
    for k, n in answer.groups.items():
        kind = asked.kinds[k]
        if not kind.attained or kind.held is not None:
            continue
        flows: dict[str, float] = {}
        for t in kind.tiers:
            rate = rates.get((kind.pool, t))
            if rate is not None and (flow := answer.flows.get((k, t), 0.0)) > 0:
                flows[t] = flow * min(rate / answer.safe[kind.pool, t], 1.0)
        uses = {t: flow / kind.rate(t) / n for t, flow in flows.items()}
        if (used := sum(uses.values())) > 0:
            yield kind.pool, sum(use / used * (1 - met(kind, min(used, 1.0), t)) for t, use in uses.items()), flows


def rated(asked: Problem, answer: Answer) -> Answer:
    """With the worth of what misses all the same taken off its score."""
    each = {(w.pool, w.tier): w.earned(got) / got if (got := answer.served[w.pool, w.tier]) > 0 else 0.0 for w in asked.wants}
    rates = {(w.pool, w.tier): w.rate for w in asked.wants}
    lost = 0.0
    for pool, missed, flows in _missing(asked, answer, rates):
        lost += missed * sum(each[pool, t] * flow for t, flow in flows.items())
    return replace(answer, score=answer.score - lost)


def good(asked: Problem, answer: Answer, rates: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """requests/s of each tier that meet their targets, where so much of it comes: never more than that."""
    real = spilled(asked, answer)
    found = {key: min(real.served.get(key, 0.0), rate) for key, rate in rates.items()}
    for pool, missed, flows in _missing(asked, real, rates):
        for t, flow in flows.items():
            found[pool, t] -= missed * flow
    return found


ROUNDS = 4
"""In which tiers, one after the other, spread over their groups as the others leave room."""


def _spread(asked: Problem, answer: Answer) -> dict[tuple[str, str], dict[int, float]]:
    """requests/s of each tier through the kinds that serve it, where all that surely comes goes to the least used of its groups."""
    rooms = {
        (w.pool, w.tier): {k: asked.kinds[k].rate(w.tier) * n for k, n in answer.groups.items() if asked.kinds[k].pool == w.pool}
        for w in asked.wants
    }
    comes = {key: dict.fromkeys((k for k, rate in room.items() if rate > 0), 0.0) for key, room in rooms.items()}
    used = dict.fromkeys(answer.groups, 0.0)
    for _ in range(ROUNDS):
        for w in asked.wants:
            mine, room = comes[w.pool, w.tier], rooms[w.pool, w.tier]
            others = sorted((used[k] - rate / room[k], k) for k, rate in mine.items())
            level, filled, width = 0.0, 0.0, 0.0
            for i, (below, k) in enumerate(others):  # up to where the next group is as much used, until all of it has a place
                filled, width = filled + below * room[k], width + room[k]
                level = (w.least + filled) / width
                if i + 1 == len(others) or level <= others[i + 1][0]:
                    break
            for below, k in others:
                mine[k] = max(level - below, 0.0) * room[k]
                used[k] = below + mine[k] / room[k]
    return comes


def spilled(asked: Problem, answer: Answer) -> Answer:
    """What comes of it where a tier is short: routers fill the least used of its groups, and nothing keeps those for others that share
    them, so a group of which more is asked than it can serve the same part of all that comes. Tiers whose groups have room serve as before.
    """
    if all(answer.served[w.pool, w.tier] >= w.least * (1 - 1e-9) for w in asked.wants):
        return answer
    comes = _spread(asked, answer)
    used: dict[int, float] = {}
    for (_, tier), through in comes.items():
        for k, rate in through.items():
            used[k] = used.get(k, 0.0) + rate / asked.kinds[k].rate(tier) / answer.groups[k]
    served, safe, flows, score = dict(answer.served), dict(answer.safe), dict(answer.flows), answer.score
    for w in asked.wants:
        through = comes[w.pool, w.tier]
        if any(used[k] > 1 + 1e-9 for k, rate in through.items() if rate > 0):
            before, now = served[w.pool, w.tier], {k: rate / max(used[k], 1.0) for k, rate in through.items()}
            flows |= {(k, w.tier): rate for k, rate in now.items()}
            served[w.pool, w.tier] = safe[w.pool, w.tier] = sum(now.values())
            score += w.earned(served[w.pool, w.tier]) - w.earned(before)
    return replace(answer, served=served, safe=safe, flows=flows, score=score)


def apart(asked: Problem) -> Problem:
    """The same question where no group may be shared."""
    alone = tuple(k if len(k.tiers) == 1 else replace(k, rates=(0.0,) * len(k.rates)) for k in asked.kinds)
    return replace(asked, kinds=alone)
