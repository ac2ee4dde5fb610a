"""What a plane has decided for one pool, before it is a plan for nodes."""

from collections.abc import Iterable
from dataclasses import dataclass

from nitsum.planner.place import Placed
from nitsum.planner.question import PoolQuestion
from nitsum.planner.serve import Serving
from nitsum.planner.types import NodeView, PoolPlan


@dataclass(frozen=True)
class Decided:
    """Of one pool. `serving` None: nothing about its groups can be computed now. `asleep`: demand is not known, limits stay."""

    q: PoolQuestion
    placed: tuple[Placed, ...]
    serving: Serving | None
    plan: PoolPlan
    asleep: bool = False


def as_placed(q: PoolQuestion, nodes: Iterable[NodeView] | None = None) -> list[Placed]:
    """What runs of a pool; `nodes`: other than those it may use."""
    gpus = {g.uuid: g for n in (q.nodes if nodes is None else nodes) for g in n.node.gpus}
    return [
        Placed(p, a, tuple(gpus[u] for u in uuids), tiers, split)
        for (p, a, uuids, split), tiers in sorted(q.running.items(), key=lambda of: of[0][:3])
        if all(u in gpus for u in uuids)
    ]
