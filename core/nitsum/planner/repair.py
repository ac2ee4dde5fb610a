"""What is done in every mode: GPUs that nothing uses get groups. Those that the spec, the model or the budget no longer have room for have
ended before (`question.ask`)."""

from collections.abc import Iterable

from nitsum.planner.place import Placed
from nitsum.planner.problem import Kind
from nitsum.planner.question import PoolQuestion
from nitsum.planner.words import describe, parts, told


def fill(
    questions: list[PoolQuestion], placed: list[Placed], barred: set[str], found: tuple[Kind, ...], widest: int = 1 << 30
) -> list[Placed]:
    """GPUs that nothing uses: groups of the width at which a GPU serves most of the strictest tier (the smallest where there is no SLO),
    within the budget, for every tier."""
    used = barred | {g.uuid for p in placed for g in p.gpus}
    result = list(placed)
    for q in questions:
        left = q.budget - sum(len(p.gpus) for p in result if p.pool == q.pool.name)
        tiers = tuple(t.name for t in q.slo_tiers)
        each = {
            k.tp_size: k.rates[0] / k.tp_size for k in found if k.pool == q.pool.name and k.tiers == tiers[:1] and tiers and k.split is None
        }
        for tp_size in sorted((t for t in q.tps if t <= widest), key=lambda t: (-each.get(t, 0.0), -t if tiers else t)):
            for n in q.nodes if tp_size <= left else ():
                for block in n.node.blocks(tp_size):
                    if tp_size <= left and not used & {g.uuid for g in block}:
                        used |= {g.uuid for g in block}
                        left -= tp_size
                        result.append(Placed(q.pool.name, n.node.agent_id, block, tiers))
    return sorted(result, key=lambda p: p.key)


def repaired(q: PoolQuestion, placed: Iterable[Placed]) -> list[str]:
    after = list(placed)
    if {p.key for p in after} == set(q.had) or not q.had:
        return []
    return [f"what it may use changed: {describe(parts(q.had))} -> {told(after)}"]
