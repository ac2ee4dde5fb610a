"""Kinds of groups that a pool could have, with the rates that each of them safely serves."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from nitsum.perf import KvLoad
from nitsum.planner import offer
from nitsum.planner.capacity import Capacity, Mark, mark, version
from nitsum.planner.place import Placed
from nitsum.planner.problem import Kind
from nitsum.planner.question import PoolQuestion
from nitsum.planner.sharing import crowd_of, runs_of, work
from nitsum.planner.split import Shape
from nitsum.planner.types import Snapshot

ALONE = 2
"""Times the groups that its own work would fill: among more a tier's arrivals are hardly spread, whoever shares them."""


def kinds(question: PoolQuestion, snapshot: Snapshot, capacity: Capacity, stand: Mapping[int, int] | None = None) -> tuple[Kind, ...]:
    """Runs of neighbours in strictness (few, or all), at every TP. A pool without SLOs has one kind per TP for its background tiers.
    Then split blocks: those that run, and without `stand` those that are worth it (`offer`).

    `stand`: how many groups of which TP there are, where that is settled: a tier is spread over no more than those.
    """
    pool, tiers = question.pool, question.slo_tiers
    model = snapshot.step_times[pool.name]
    marks = {t.name: mark(question.demand[t.name]) for t in tiers}
    runs = runs_of(tiers)
    prompts = {n: (m.prompt, m.prompt_spread) for n, m in marks.items()}
    known = capacity.kinds(pool.name, (version(model), question.tps, tiers))
    numbers = {name: capacity.number(m) for name, m in marks.items()}
    lengths = [tuple([numbers[t] for t, _, _ in sharing]) for sharing in runs]
    found: list[Kind | None] = []
    for tp_size in question.tps if stand is None else sorted(stand):
        works = {t.name: work(question.demand[t.name], model, tp_size) for t in tiers}
        whole, groups = sum(works.values()), question.budget // tp_size if stand is None else stand[tp_size]
        alone = {t: ALONE * crowd_of(groups, part / whole) for t, part in works.items()}
        for sharing, length in zip(runs, lengths, strict=True):
            crowd = crowd_of(groups, sum([works[t] for t, _, _ in sharing]) / whole)
            crowds = tuple([min(crowd, alone[t]) for t, _, _ in sharing])
            key = tp_size, crowds, sharing[0][0], length
            if (before := known.get(key)) is not None and (before[1] or capacity.left == 0):
                found.append(before[0])
                continue
            capacity.guessed = False
            safe = [
                capacity.of(model, tp_size, whose, marks[t], goal, question.tps, prompts.get(guest), len(sharing) == 1, among)
                for (t, goal, guest), among in zip(sharing, crowds, strict=True)
                for whose in [f"{pool.name}/{t}/{guest}"]
            ]
            kind = None
            if len(sharing) == 1 or all(s.rate for s in safe):  # else fewer share it as well
                names = tuple(t for t, _, _ in sharing)
                rates, binding, batches = tuple(s.rate for s in safe), tuple(s.binding for s in safe), tuple(s.batch for s in safe)
                attained = tuple(s.attained for s in safe)
                kind = Kind(pool.name, tp_size, names, rates, binding, batches, safe[0].partly if len(safe) == 1 else None, None, attained)
            found.append(kind)
            known[key] = kind, not capacity.guessed
        if not tiers:
            found.append(Kind(pool.name, tp_size, (), ()))
    mixed = tuple(k for k in found if k is not None)
    return mixed + _blocks(question, snapshot, capacity, marks, mixed if stand is None else None)


def standing(placed: Iterable[Placed]) -> Mapping[int, int]:
    """Groups by TP, those of split blocks left out."""
    return Counter(len(p.gpus) for p in placed if p.split is None)


def _blocks(
    q: PoolQuestion, snapshot: Snapshot, capacity: Capacity, marks: dict[str, Mark], mixed: tuple[Kind, ...] | None
) -> tuple[Kind, ...]:
    """Kinds of split blocks. `mixed` None: only of those that run."""
    if not q.slo_tiers or (mixed is None and not q.splits):
        return ()
    name, cost = q.pool.name, snapshot.flip_costs[q.pool.name]
    load = cost if isinstance(cost, KvLoad) else None
    rates, gpus = {t.name: q.demand[t.name].rate for t in q.slo_tiers}, max(len(n.node.gpus) for n in q.nodes)
    asked = offer.Asked(name, q.slo_tiers, marks, rates, q.tps, q.budget, gpus, snapshot.step_times[name], load)
    return offer.kinds(asked, capacity, mixed if load is not None else None, q.splits)


def nearest(problem_kinds: tuple[Kind, ...], pool: str, shape: Shape, tiers: Collection[str]) -> int | None:
    """The kind whose tiers are most like these."""
    asked = frozenset(tiers)
    same = [(i, k.members) for i, k in enumerate(problem_kinds) if k.shape == shape and k.pool == pool]
    alike = next((i for i, members in same if members == asked), None)
    if alike is not None or not same:
        return alike
    return max(same, key=lambda of: (len(asked & of[1]) - 0.5 * len(of[1] - asked), -of[0]))[0]


def sizes_of(of: tuple[Kind, ...]) -> set[int]:
    return {k.tp_size for k in of if k.split is not None}
