"""`replicas`: `replicas-tpN` at the TP that a sweep before deployment would choose, as Dynamo's profiler does: of those at which a replica
holds its targets, the one with the most throughput per GPU.

Judged by the attainment model with the true mean demand of the whole workload: at which TP one replica alone holds the targets of most
tiers; of these, where replicas need the fewest GPUs for those tiers; of equals the narrowest.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from nitsum.attainment import Goal
from nitsum.demand import TierDemand
from nitsum.planner.capacity import Capacity, mark
from nitsum.sim.arrivals import Traffic
from nitsum.sim.demand import Foresight
from nitsum.sim.fleet import Fleet
from nitsum.sim.policies import replicas
from nitsum.sim.policies.registry import Setting, build
from nitsum.sim.result import RunResult

NAME = replicas.NAME


def chosen(s: Setting, seen: Iterable[TierDemand]) -> tuple[int, int, int]:
    """(TP, tiers whose targets one replica holds there, tiers that count: with an SLO and requests). Raises InvalidSpec as
    `replicas.degrees`."""
    demand = {d.tier: d for d in seen if d.rate > 0}
    tiers = [t for t in s.pool.tiers if not t.background and t.name in demand]
    capacity = Capacity(governed=True)

    def judged(tp_size: int) -> tuple[int, float, int]:
        held, gpus = 0, 0.0
        for t in tiers:
            goal = Goal(t.ttft_ms, t.tpot_ms, t.target)
            safe = capacity.of(s.model, tp_size, t.name, mark(demand[t.name]), goal, (tp_size,))
            if safe.rate > 0:
                held, gpus = held + 1, gpus + tp_size * demand[t.name].rate / safe.rate
        return -held, gpus, tp_size

    least = min(map(judged, replicas.degrees(s.pool, s.nodes, s.tps, f"policy {NAME}")))
    return least[2], -least[0], len(tiers)


def best(s: Setting, traffic: Traffic, progress: Callable[[float], None], name: str = NAME) -> RunResult:
    """Raises InvalidSpec where at no TP every tier can have a replica."""
    tp_size, held, of = chosen(s, Foresight(s.pool.name, tuple(t.name for t in s.pool.tiers), traffic)(0.0, traffic.duration_s))
    policy = replace(build(f"{NAME}-tp{tp_size}", s), name=name)
    result = Fleet(policy, s.nodes, s.model, traffic).run(progress)
    return replace(result, note=f"TP{tp_size}, where one replica holds the targets of {held} of {of} tiers; {result.note}")
