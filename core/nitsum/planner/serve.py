"""Which of a pool's groups serve which tiers, given their widths: what can change each second, since nothing restarts.

Groups of one TP are alike, so what is sought are counts of kinds again, by the slow plane's greedy search with every width fixed. A looser
tier shares a stricter one's groups (borrows) only as a kind of both, whose rates hold the strictest targets of the two. What serves now
stays while it meets all demand, or no other labelling earns more by `gain_min`: labels must not tremble with demand.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from nitsum.planner import greedy, relabel
from nitsum.planner.answer import SHORT, Answer, value, wins
from nitsum.planner.kinds import nearest
from nitsum.planner.narrow import narrowed
from nitsum.planner.place import Placed, Running, Slot, labelled
from nitsum.planner.problem import Class, Counts, Kind, Problem
from nitsum.planner.question import PoolQuestion, wants
from nitsum.planner.rating import apart, rated, spilled
from nitsum.planner.split import Shape

APART = 0.98
"""Of the score of shared groups, as it spills: what is foreseen of sharing is on the bright side."""
SURGE_MAX = 4.0
"""Multiple of a tier's demand up to which groups are labelled for it alone; those beyond are for all, whichever comes."""


@dataclass(frozen=True)
class Serving:
    """Labels of a pool's groups and split blocks, and the flows of each tier through them. `kinds`: by shape and tiers."""

    placed: tuple[Placed, ...]
    asked: Problem
    answer: Answer
    sheltered: frozenset[str] = frozenset()
    """Tiers that no group is left for: one takes them in."""

    @cached_property
    def covered(self) -> frozenset[str]:
        return frozenset(t for p in self.placed for t in p.tiers)

    @cached_property
    def _at(self) -> dict[tuple[Shape, tuple[str, ...]], int]:
        return {(k.shape, k.tiers): i for i, k in reversed(list(enumerate(self.asked.kinds)))}

    def kind(self, shape: Shape, tiers: tuple[str, ...]) -> int | None:
        exact = self._at.get((shape, tiers))
        return exact if exact is not None or not self.asked.kinds else nearest(self.asked.kinds, self.asked.kinds[0].pool, shape, tiers)

    def used(self, k: int) -> float:
        """Part of the time of a group of this kind that demand takes."""
        kind, groups = self.asked.kinds[k], self.answer.groups.get(k, 0)
        total = 0.0
        for w in self.asked.wants:
            if groups and (flow := self.answer.flows.get((k, w.tier), 0.0)) > 0:
                total += flow / kind.rate(w.tier) / groups * min(w.rate / self.answer.safe[w.pool, w.tier], 1.0)
        return min(total, 1.0)


def _best(asked: Problem) -> Answer:
    """Where not all can be served, nothing keeps what tiers share from those that come most: groups of their own may serve more then, if
    that leaves no other tier short."""
    best = greedy.solve(asked)
    if not (short := _short(asked, best)) or len(asked.wants) < 2:
        return best
    alone = greedy.solve(apart(asked))
    return alone if _short(asked, alone) <= short and spilled(asked, alone).score > APART * spilled(asked, best).score else best


def _apart(asked: Problem, answer: Answer) -> bool:
    return all(len(asked.kinds[k].tiers) == 1 for (_, k), n in answer.counts.items() if n)


def _short(asked: Problem, answer: Answer) -> set[str]:
    return {w.tier for w in asked.wants if answer.served[w.pool, w.tier] < SHORT * w.rate}


def _whole(kinds: tuple[Kind, ...], shape: Shape) -> int | None:
    """For groups that no demand needs: as many tiers as one group can hold the targets of, loosest first."""
    able = [i for i, k in enumerate(kinds) if k.shape == shape and k.rates and min(k.rates) > 0]
    some = able or [i for i, k in enumerate(kinds) if k.shape == shape]
    return max(some, key=lambda i: (len(kinds[i].tiers), i), default=None)


def _asked(q: PoolQuestion, kinds: tuple[Kind, ...], placed: list[Placed]) -> tuple[Problem, Counts]:
    """The pool's groups by shape, each shape a class of its own, and what they serve now as counts."""
    name, many = q.pool.name, Counter(p.shape for p in placed)
    shapes = sorted(many)
    mine = tuple(k for k in kinds if k.pool == name and k.shape in many)
    classes = tuple(Class(many[shape], shape[0], frozenset({name}), {shape[0]: 1}, shape) for shape in shapes)
    demand = tuple(wants(q, SURGE_MAX))
    now: Counts = {}
    for (shape, tiers), n in Counter((p.shape, p.tiers) for p in placed).items():
        if (k := nearest(mine, name, shape, tiers)) is not None:
            key = shapes.index(shape), k
            now[key] = now.get(key, 0) + n
    return Problem(demand, mine, classes, {name: sum(shape[0] * n for shape, n in many.items())}), now


def as_labelled(q: PoolQuestion, kinds: tuple[Kind, ...], placed: list[Placed]) -> Serving:
    """For groups whose tiers are given: only flows and limits follow demand."""
    asked, now = _asked(q, kinds, placed)
    return Serving(tuple(placed), asked, value(asked, now, "as it serves"))


def serve(
    q: PoolQuestion,
    kinds: tuple[Kind, ...],
    placed: list[Placed],
    gain_min: float,
    anew: bool = False,
    at_best: Callable[[Problem, Answer], Answer] = lambda _, answer: answer,
) -> Serving:
    """`placed`: the pool's groups with the tiers they serve now. `anew`: those labels are a plan's, which only its score keeps.
    `at_best`: finds better flows through the same groups."""
    asked, now = _asked(q, kinds, placed)
    name, mine = q.pool.name, asked.kinds
    many = Counter(p.shape for p in placed)
    shapes = sorted(many)
    if not q.slo_tiers or not mine:
        return Serving(tuple(placed), asked, value(asked, {}, "as it runs"))
    chosen = at_best(asked, value(asked, now, "as it serves"))
    if anew or any(chosen.served[w.pool, w.tier] < w.rate * (1 - 1e-9) for w in asked.wants):
        best = narrowed(asked, _best(asked))  # as it would serve
        other, same = spilled(asked, best), spilled(asked, chosen)
        short = _short(asked, chosen)  # then nothing keeps what tiers share from those that come most
        if short and _short(asked, best) <= short and _apart(asked, best) and not _apart(asked, chosen):
            earns_more = other.score > APART * same.score
        elif anew:
            earns_more = rated(asked, other).score > rated(asked, same).score
        else:
            lost = relabel.lost(asked, {t.name: t for t in q.slo_tiers}, q.demand, chosen, best)
            part = APART if short and _apart(asked, chosen) and not _apart(asked, best) else 1.0
            earns_more = wins(asked, replace(other, score=other.score * part - lost), same, gain_min)
        if earns_more:
            chosen = best
    counts = dict(chosen.counts)
    for c, shape in enumerate(shapes):
        idle = many[shape] - sum(n for (of, _), n in counts.items() if of == c)
        if idle and (k := _whole(mine, shape)) is not None:
            counts[c, k] = counts.get((c, k), 0) + idle
    answer = value(asked, counts, chosen.by) if counts != chosen.counts else chosen
    answer = narrowed(asked, answer)
    counts = dict(answer.counts)
    running: Running = {p.key: p.tiers for p in placed}
    wanted: Counter[tuple[Shape, tuple[str, ...]]] = Counter()
    for (c, k), n in counts.items():
        wanted[shapes[c], mine[k].tiers] += n
    stays = wanted == Counter([(p.shape, p.tiers) for p in placed])
    found: list[Placed] = list(placed) if stays else []
    for c, shape in () if stays else enumerate(shapes):
        slots = [Slot(name, shape[0], mine[k].tiers, n, mine[k].split) for (of, k), n in sorted(counts.items()) if of == c]
        blocks = [(p.agent_id, p.gpus) for p in placed if p.shape == shape]
        found += labelled(name, slots, blocks, running)
    missing = frozenset(t.name for t in q.slo_tiers) - {t for p in found for t in p.tiers}
    return Serving(tuple(sorted(_sheltered(q, found), key=lambda p: p.key)), asked, answer, missing)


def _sheltered(q: PoolQuestion, found: list[Placed]) -> list[Placed]:
    """A tier that no group is left for goes to one of the loosest: on all of them its prompts would break what the others hold."""
    order = [t.name for t in q.slo_tiers]
    missing = [t for t in order if not any(t in p.tiers for p in found)]
    if not missing or len(found) < 2:
        return found
    one = max(found, key=lambda p: (p.split is None, max((order.index(t) for t in p.tiers if t in order), default=-1), p.key))
    return [replace(p, tiers=tuple(t for t in order if t in (*p.tiers, *missing))) if p is one else p for p in found]


def as_kinds(q: PoolQuestion, kinds: tuple[Kind, ...], placed: list[Placed], gain_min: float) -> Running:
    """What runs, with the labels that it would get; tiers that are only taken in do not count, for they would make a group look worse."""
    serving = serve(q, kinds, placed, gain_min)
    return {p.key: tuple(t for t in p.tiers if t not in serving.sheltered) or p.tiers for p in serving.placed}


def relabelled(placed: list[Placed], labels: Running) -> list[Placed]:
    return [replace(p, tiers=labels.get(p.key, p.tiers)) for p in placed]
