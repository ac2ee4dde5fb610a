"""A pool's plan in words and figures: its layout, why it is so, what was not worth the switch."""

from nitsum.planner.answer import Answer
from nitsum.planner.problem import Problem
from nitsum.planner.question import PoolQuestion
from nitsum.planner.serve import Serving
from nitsum.planner.types import PoolPlan, Snapshot, Verdict
from nitsum.planner.words import crowded, describe, goodput, outlook, parts, profile, shape, told


def pool_plan(
    q: PoolQuestion,
    snapshot: Snapshot,
    asked: Problem,
    serving: Serving,
    answers: tuple[Answer, Answer, Answer, Answer],
    change: bool,
    gain_min: float,
    lasts: float,
) -> PoolPlan:
    """Reasons of a pool that could change. `lasts`: seconds that the plan counts on for its layout."""
    current, base, best, answer = answers
    name = q.pool.name
    if not serving.placed and not q.had:
        return PoolPlan(name, 0, 0.0, (), (crowded(q, snapshot),), verdict=Verdict.BLOCKED)
    was, will = describe(parts(q.running)), told(serving.placed)
    same = {p.key for p in serving.placed} == set(q.running)
    reasons = [profile(q, snapshot), *([best.note] if best.note else [])]
    before, after = goodput(q, asked, current), goodput(q, asked, answer)
    if q.had and set(q.running) != set(q.had):
        reasons.append(f"what it may use changed: {describe(parts(q.had))} -> {was}")
    if q.had and not q.running:
        reasons.append(f"nothing that runs fits the spec or the GPUs any more: {will}")
    elif not q.running:
        reasons.append(f"first layout: {will}")
    elif same:
        other = asked.widths(best.counts) != asked.widths(base.counts)
        gain = best.score / base.score - 1 if other and base.score > 0 else 0.0
        reasons.append(f"{was} stays: the best other shape gains {max(gain, 0):.0%}, {gain_min:.1%} is asked")
    elif not change:
        reasons.append(f"its GPUs changed: {was} -> {will}")
    else:
        worth = "" if after > before else f", but {base.score:.2f} -> {best.score:.2f} by target and weight"
        reasons.append(f"{was} -> {will}: expected goodput {before:.2f} -> {after:.2f} requests/s{worth}, expected to last {lasts:.0f} s")
    rejected = []
    if change and q.running:
        rejected.append(f"{was} as it runs: expected goodput {before:.2f} requests/s, score {base.score:.2f} against {best.score:.2f}")
    stands = asked.widths(base.counts)
    # Fewer groups, or other labels, would switch nothing.
    if not change and any(n > stands.get(key, 0) for key, n in asked.widths(best.counts).items() if key[1] == name):
        rejected.append(
            f"{shape(asked, best.counts, name)}: expected goodput {goodput(q, asked, best):.2f} requests/s, not worth the switch"
        )
    verdict = Verdict.KEEP if {p.key for p in serving.placed} == set(q.had) else Verdict.CHANGE
    gpus = sum(len(p.gpus) for p in serving.placed)
    return PoolPlan(
        name, gpus, goodput(q, serving.asked, serving.answer), outlook(q, asked.kinds, serving), tuple(reasons), tuple(rejected), verdict
    )
