"""The slow plane's fallback: groups one by one, each the one that gains most per GPU, then swaps while one helps. Shares `value`."""

from nitsum.planner.problem import Answer, Counts, Problem, value

SWAPS_MAX = 64


def _moves(problem: Problem) -> list[tuple[int, int]]:
    return [
        (c, k)
        for c, cls in enumerate(problem.classes)
        for k, kind in enumerate(problem.kinds)
        if kind.pool in cls.pools and cls.blocks.get(kind.tp_size, 0) > 0 and any(kind.rates)
    ]


def _with(counts: Counts, key: tuple[int, int], n: int) -> Counts:
    changed = dict(counts)
    changed[key] = changed.get(key, 0) + n
    if changed[key] <= 0:
        del changed[key]
    return changed


def solve(problem: Problem, start: Counts | None = None, swaps_max: int = SWAPS_MAX) -> Answer:
    """From nothing or from `start`, which only grows where `swaps_max` is 0. Steps double where the same kind keeps winning, so that work
    does not grow with the fleet."""
    best = value(problem, start if start is not None and problem.legal(start) else {}, "greedy")
    moves = _moves(problem)
    step: dict[tuple[int, int], int] = {}
    while True:
        found: tuple[float, tuple[int, int], Answer] | None = None
        for key in moves:
            for n in {step.get(key, 1), 1}:
                trial = _with(best.counts, key, n)
                if not problem.legal(trial):
                    continue
                answer = value(problem, trial, "greedy")
                gain = (answer.score - best.score) / (n * problem.kinds[key[1]].tp_size)
                if answer.score > best.score + 1e-9 and (found is None or gain > found[0] + 1e-12):
                    found = gain, key, answer
        if found is None:
            break
        step[found[1]] = min(step.get(found[1], 1) * 2, 1 << 12)
        best = found[2]
    for _ in range(swaps_max):
        better = _swap(problem, best, moves)
        if better is None:
            break
        best = better
    return best


def _swap(problem: Problem, best: Answer, moves: list[tuple[int, int]]) -> Answer | None:
    """One group out, as many of another kind in as its GPUs allow; the best such exchange, None where none helps."""
    found: Answer | None = None
    for out in sorted(best.counts):
        freed = problem.kinds[out[1]].tp_size
        for key in moves:
            if key == out or key[0] != out[0]:
                continue
            size = problem.kinds[key[1]].tp_size
            gone = max(-(-size // freed), 1)
            if best.counts[out] < gone:
                continue
            trial = _with(_with(best.counts, out, -gone), key, max(gone * freed // size, 1))
            if not problem.legal(trial):
                continue
            answer = value(problem, trial, "greedy")
            if answer.score > max(best.score, found.score if found else best.score) + 1e-9:
                found = answer
    return found
