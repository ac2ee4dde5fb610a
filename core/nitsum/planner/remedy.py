"""What would make a tier feasible: looser targets where no TP holds them, else GPUs."""

import math
from dataclasses import replace

from nitsum.planner import greedy
from nitsum.planner.answer import holding
from nitsum.planner.capacity import Capacity, mark
from nitsum.planner.kinds import kinds, sizes_of
from nitsum.planner.problem import Class, Problem
from nitsum.planner.question import PoolQuestion, wants
from nitsum.planner.sharing import goal_of
from nitsum.planner.types import Snapshot
from nitsum.pool import Tier

FACTOR_MAX = 64.0
GPUS_MAX = 1 << 23


def _least(q: PoolQuestion, snapshot: Snapshot, capacity: Capacity, tier: Tier, loosened: str) -> tuple[float, int] | None:
    """(least value of one target that some TP can hold, which)."""
    model, m = snapshot.step_times[q.pool.name], mark(q.demand[tier.name])
    value = tier.ttft_ms if loosened == "ttft_ms" else tier.tpot_ms
    if value is None:
        return None

    def able(factor: float) -> int | None:
        goal = replace(goal_of(tier)[0], **{loosened: value * factor})
        return next((tp for tp in q.tps if capacity.of(model, tp, f"{q.pool.name}/{tier.name}", m, goal, q.tps).rate > 0), None)

    if able(FACTOR_MAX) is None:
        return None
    low, high = 1.0, FACTOR_MAX
    while high > low * 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if able(middle) is not None else (middle, high)
    tp_size = able(high)
    assert tp_size is not None
    return value * high, tp_size


def _gpus(q: PoolQuestion, snapshot: Snapshot, capacity: Capacity, able: set[str], tried: int) -> int | None:
    """GPUs in all, on nodes like the largest there is, with which every tier that can be served is. Those that lost nodes may hold come on
    top."""
    found = kinds(q, snapshot, capacity)
    widest = max(q.nodes, key=lambda n: len(n.node.gpus)).node
    each, blocks = len(widest.gpus), {size: len(widest.blocks(size)) for size in {*q.tps, *sizes_of(found)}}
    asked = [w for w in wants(q) if w.tier in able]

    def enough(gpus: int) -> bool:
        cls = Class(-(-gpus // each), each, frozenset({q.pool.name}), blocks)
        question = Problem(tuple(asked), found, (cls,), {q.pool.name: gpus})
        return len(holding(question, greedy.solve(question))) == len(asked)

    low, high = tried, tried + 1
    while not enough(high):
        low, high = high, high * 2
        if high > GPUS_MAX:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high + q.pool.budget_gpus - q.budget


def remedies(q: PoolQuestion, snapshot: Snapshot, capacity: Capacity, infeasible: set[str], tried: int) -> tuple[str, ...]:
    """One sentence each. Empty where all is feasible. `tried`: GPUs with which it is known to be not, in their best layout."""
    if not infeasible or q.blocked:
        return ()
    found = kinds(q, snapshot, capacity)
    hopeless = {t.name for t in q.slo_tiers if not any(k.rate(t.name) > 0 and k.full for k in found if k.tiers == (t.name,))}
    said = []
    for t in q.slo_tiers:
        if t.name in hopeless:
            ways = [
                f"{label} of {least[0]:.0f} ms (TP {least[1]})"
                for field, label in (("ttft_ms", "a TTFT"), ("tpot_ms", "a TPOT"))
                if (least := _least(q, snapshot, capacity, t, field)) is not None
            ]
            can = " or ".join(ways) or "nothing near them"
            said.append(f"{t.name}: no TP holds its targets for {t.target:.0%} of the requests; {can} can be held")
    if infeasible - hopeless:
        able = {t.name for t in q.slo_tiers} - hopeless
        gpus = _gpus(q, snapshot, capacity, able, tried)
        many = f"{gpus} GPUs in all would hold" if gpus else "no number of GPUs holds"
        said.append(f"{', '.join(sorted(infeasible - hopeless))}: {many} the targets of {', '.join(sorted(able))}")
    return tuple(said)
