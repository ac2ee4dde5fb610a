"""The slow plane's fallback: groups one sort at a time, each the one whose group earns most per GPU on the demand that is still unmet.

A step adds as many equal groups as earn the same, so the steps are bounded by pieces of demand and resources, not by the fleet. Shares
`value` with the exact search; what it loses to it are flows, which `exact.solve(fixed=...)` finds again.
"""

import heapq

from nitsum.planner.answer import Answer, value
from nitsum.planner.problem import Counts, Problem

STEPS_MAX = 10_000


class _Left:
    """Demand and room that are left."""

    def __init__(self, problem: Problem, start: Counts) -> None:
        self.problem = problem
        pieces = [w.pieces() for w in problem.wants]
        self.need = [[width for width, _ in of] for of in pieces]
        self.budget = dict(problem.budgets)
        self.gpus = [c.nodes * c.gpus for c in problem.classes]
        self.blocks = [{tp: n * c.nodes for tp, n in c.blocks.items()} for c in problem.classes]
        self.runs = dict(problem.runs)
        self.counts: Counts = {}
        self.taken, self.changed = 0, [0] * len(problem.wants)
        """Steps so far, and the last one that changed what a tier needs."""
        self.members: list[tuple[int, ...]] = []
        self.filled: list[tuple[int, float, list[tuple[int, int, float]]]] = [(-1, 0.0, [])] * len(problem.kinds)
        index = {(w.pool, w.tier): t for t, w in enumerate(problem.wants)}
        self.ways: list[list[tuple[float, int, int, float, float]]] = []
        """By kind: (-worth x rate, want, piece, rate, worth), what earns most last."""
        for kind in problem.kinds:
            ways = [
                (-worth * rate, t, piece, rate, worth * rate / rate)  # rounded as the rank is: equal kinds stay equal
                for tier, rate in kind.by_tier.items()
                if rate > 0 and (t := index.get((kind.pool, tier))) is not None
                for piece, (_, worth) in enumerate(pieces[t])
            ]
            ways.sort(reverse=True)
            self.ways.append(ways)
            self.members.append(tuple({w[1] for w in ways}))
        self.places = [tuple(c for c, cls in enumerate(problem.classes) if cls.takes(kind)) for kind in problem.kinds]
        for (c, k), n in sorted(start.items()):
            self.take(c, k, n, self.fill(k, float(n))[1])

    def fill(self, k: int, groups: float) -> tuple[float, list[tuple[int, int, float]]]:
        """(what so many groups earn on what is left, the pieces they fill)."""
        earned, left, filled = 0.0, groups, []
        needs, ways = self.need, self.ways[k]
        while ways and needs[ways[-1][1]][ways[-1][2]] <= 1e-12:
            ways.pop()  # what is filled stays so
        for _, t, piece, rate, worth in reversed(ways):
            if (need := needs[t][piece]) <= 1e-12:
                continue
            got = left * rate
            if got >= need:
                got = need
            if got > 1e-12:
                earned += worth * got
                left -= got / rate
                filled.append((t, piece, got))
                if left <= 1e-12:
                    break
        return earned, filled

    def room(self, c: int, k: int) -> int:
        kind = self.problem.kinds[k]
        return max(
            min(
                self.budget.get(kind.pool, 0) // kind.tp_size,
                self.gpus[c] // kind.tp_size,
                self.blocks[c].get(kind.tp_size, 0),
            ),
            0,
        )

    def loss(self, c: int, k: int) -> float:
        """Of one more group there: nothing where one of this pool and shape runs."""
        kind = self.problem.kinds[k]
        if not self.problem.runs or self.runs.get((c, kind.pool, kind.shape), 0) > 0:
            return 0.0
        return self.problem.new_loss(kind.pool, kind.shape)

    def take(self, c: int, k: int, n: int, filled: list[tuple[int, int, float]]) -> None:
        kind = self.problem.kinds[k]
        self.counts[c, k] = self.counts.get((c, k), 0) + n
        self.budget[kind.pool] = self.budget.get(kind.pool, 0) - n * kind.tp_size
        self.gpus[c] -= n * kind.tp_size
        self.blocks[c][kind.tp_size] = self.blocks[c].get(kind.tp_size, 0) - n
        key = c, kind.pool, kind.shape
        self.runs[key] = max(self.runs.get(key, 0) - n, 0)
        self.taken += 1
        for t, piece, got in filled:
            self.changed[t] = self.taken
            self.need[t][piece] = max(self.need[t][piece] - got, 0.0)

    def best(self, k: int) -> tuple[float, int, list[tuple[int, int, float]]] | None:
        """(what one more group earns per GPU, in which class, the pieces it fills); None: nothing, or no room."""
        kind = self.problem.kinds[k]
        tp_size = kind.tp_size
        if self.budget.get(kind.pool, 0) < tp_size:
            return None
        least, where = 0.0, -1
        for c in self.places[k]:
            if self.gpus[c] >= tp_size and self.blocks[c].get(tp_size, 0) > 0:
                loss = self.loss(c, k)
                if where < 0 or loss < least:
                    least, where = loss, c
        if where < 0:
            return None
        at, earned, filled = self.filled[k]
        changed = self.changed
        if at < 0 or any([changed[t] > at for t in self.members[k]]):
            earned, filled = self.fill(k, 1.0)
            self.filled[k] = self.taken, earned, filled
        gain = (earned - least) / tp_size
        return (gain, where, filled) if gain > 1e-12 else None


def solve(problem: Problem, start: Counts | None = None) -> Answer:
    """From nothing, or from `start`, to which groups are only added.

    What a kind earns never rises as others are added, so a kind is looked at again only when it comes to the top.
    """
    left = _Left(problem, start if start is not None and problem.legal(start) else {})
    heap = [(-found[0], k) for k in range(len(problem.kinds)) if left.ways[k] and (found := left.best(k)) is not None]
    heapq.heapify(heap)
    for _ in range(STEPS_MAX):
        if not heap:
            break
        before, k = heap[0]
        if (found := left.best(k)) is None:
            heapq.heappop(heap)
            continue
        gain, c, filled = found
        if -gain > before + 1e-12:
            heapq.heapreplace(heap, (-gain, k))
            continue
        n = min(int(min(left.need[t][piece] / got for t, piece, got in filled)), left.room(c, k))
        if problem.runs and (running := left.runs.get((c, problem.kinds[k].pool, problem.kinds[k].shape), 0)) > 0:
            n = min(n, running)  # beyond those that run the price changes
        n = max(n, 1)
        left.take(c, k, n, [(t, piece, got * n) for t, piece, got in filled])
    return value(problem, left.counts, "greedy")
