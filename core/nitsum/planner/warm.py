"""Which engines are resident on a node, and their names."""

from nitsum.layout import Group
from nitsum.planner.decided import Decided
from nitsum.planner.place import Placed
from nitsum.planner.question import PoolQuestion
from nitsum.planner.types import NodeView
from nitsum.residency import Residency, ResidentEngine


def engine_id(q: PoolQuestion, first_index: int, tp_size: int) -> str:
    return f"{_prefix(q.pool.name)}{tp_size}-{first_index}{q.mark}"


def _prefix(pool: str) -> str:
    return f"{pool.replace('/', '.')[:80]}-tp"


def residency_of(mine: list[tuple[Decided, Placed]], n: NodeView, groups: list[Group]) -> Residency:
    """Every legal TP on every block of the GPUs that a pool holds on the node."""
    engines: dict[str, ResidentEngine] = {}
    for d in {d.q.pool.name: d for d, _ in mine}.values():
        held = {g.uuid for other, p in mine if other.q.pool.name == d.q.pool.name for g in p.gpus}
        for tp_size in d.q.tps:
            for block in n.node.blocks(tp_size):
                if {g.uuid for g in block} <= held:
                    name = engine_id(d.q, block[0].index, tp_size)
                    engines[name] = ResidentEngine(name, d.q.pool.model, tp_size, tuple(g.uuid for g in block))
    for g in groups:
        engines.setdefault(g.engine_id, ResidentEngine(g.engine_id, g.model, g.tp_size, g.gpu_uuids))
    return Residency(tuple(engines[i] for i in sorted(engines)))


def still(residency: Residency, n: NodeView, waiting: list[Placed], groups: list[Group]) -> Residency:
    """With a pool's engines that are warm where its groups wait to come: they would start cold in a moment."""
    found = {e.engine_id: e for e in residency.engines}
    for p in waiting:
        mine, others = set(p.key[2]), {u for g in groups if g.pool != p.pool for u in g.gpu_uuids}
        warm = [e for e in n.residency.engines if mine.issuperset(e.gpu_uuids) and e.engine_id.startswith(_prefix(p.pool))]
        if not mine & others:
            found = {e.engine_id: e for e in warm} | found
    return Residency(tuple(found[i] for i in sorted(found)))
