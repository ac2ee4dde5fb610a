"""Replica scaling per tier at one TP under one budget, at Dynamo's intervals: every 180 s replicas by the load of the last interval, every
5 s at most one more for a tier that is overloaded, from the tier with the most to spare.

A replica belongs to one tier. Giving it to another means that one deployment drains and another starts: what runs there finishes first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from nitsum.demand import TierDemand
from nitsum.errors import InvalidSpec
from nitsum.layout import FlipMode, Group, Layout, TierShare
from nitsum.objective import mixture, safe_rate, strictest
from nitsum.perf import StepTimeModel
from nitsum.planner import NodePlan, Plan, Snapshot
from nitsum.pool import Pool
from nitsum.sim.policies.layouts import uniform
from nitsum.sim.policies.standing import Standing
from nitsum.topology import Node

NAME = "replicas"
THROUGHPUT_S, LOAD_S = 180.0, 5.0
OVERLOAD, SPARE = 1.0, 0.7
"""Load over safe capacity above which a tier wants one more, and below which one can be taken."""


def _for_tier(group: Group, tier: str, others: tuple[str, ...]) -> Group:
    name = f"{tier}@{group.engine_id.rpartition('@')[2]}"
    return replace(group, group_id=name, engine_id=name, shares=tuple(TierShare(t, 1.0) for t in sorted((tier, *others))))


def _judged(pool: Pool) -> tuple[list[str], tuple[str, ...]]:
    """Tiers with replicas of their own, and background ones, which ride along with the last of them."""
    slo = [t.name for t in pool.tiers if not t.background]
    return slo or [t.name for t in pool.tiers], tuple(t.name for t in pool.tiers if t.background) if slo else ()


def _assign(pool: Pool, layouts: Mapping[str, Layout], counts: Mapping[str, int]) -> dict[str, Layout]:
    """`counts` replicas per tier, keeping each replica's tier where it can."""
    names, background = _judged(pool)
    left = dict(counts)
    groups = [(a, g) for a, layout in sorted(layouts.items()) for g in layout.groups]
    chosen: dict[int, str] = {}
    for i, (_, g) in enumerate(groups):
        tier = g.engine_id.rpartition("@")[0]
        if left.get(tier, 0) > 0:
            chosen[i], left[tier] = tier, left[tier] - 1
    for i in range(len(groups)):
        if i not in chosen:
            tier = max(names, key=lambda t: (left[t], -names.index(t)))
            chosen[i], left[tier] = tier, left[tier] - 1
    found: dict[str, list[Group]] = {a: [] for a in layouts}
    for i, (a, g) in enumerate(groups):
        found[a].append(_for_tier(g, chosen[i], background if chosen[i] == names[-1] else ()))
    return {a: Layout(tuple(gs)) for a, gs in found.items()}


def first(pool: Pool, nodes: Sequence[Node], tp_size: int, path: str) -> dict[str, Layout]:
    """Equal parts, as nothing is known yet. Raises InvalidSpec."""
    layouts, names = uniform(pool, nodes, tp_size, path), _judged(pool)[0]
    total = sum(len(la.groups) for la in layouts.values())
    if total < len(names):
        raise InvalidSpec(path, f"{total} replicas cannot serve {len(names)} tiers apart")
    return _assign(pool, layouts, {t: total // len(names) + (i < total % len(names)) for i, t in enumerate(names)})


def degrees(pool: Pool, nodes: Sequence[Node], tps: Sequence[int], path: str) -> tuple[int, ...]:
    """Those of `tps` at which every tier can have a replica. Raises InvalidSpec where there is none."""
    least = len(_judged(pool)[0])
    most = {tp: min(pool.budget_gpus // tp, sum(len(n.blocks(tp)) for n in nodes)) for tp in tps}
    if not (found := tuple(tp for tp, n in most.items() if n >= least)):
        raise InvalidSpec(path, f"{max(most.values(), default=0)} replicas cannot serve {least} tiers apart")
    return found


class Replicas:
    """Implements `Planner`; remembers the load of its interval."""

    def __init__(self, pool: Pool, nodes: Sequence[Node], tp_size: int) -> None:
        self.pool, self.tp_size = pool, tp_size
        self._standing = Standing()
        self.seen: dict[str, list[TierDemand]] = {}
        self.scaled_at = self.looked_at = 0.0

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        for d in snapshot.demand:
            self.seen.setdefault(d.tier, []).append(d)
        busy = any(n.flipping for n in snapshot.nodes)
        layouts = {n.node.agent_id: n.layout for n in snapshot.nodes}
        counts = self._counts(layouts)
        wanted = dict(counts)
        if now - self.scaled_at >= THROUGHPUT_S and not busy:
            means = {t: replace(ds[-1], rate=sum(d.rate for d in ds) / len(ds)) for t, ds in self.seen.items()}
            wanted = self._by_throughput(snapshot.step_times[self.pool.name], means, sum(counts.values()))
            self.scaled_at = self.looked_at = now
            self.seen.clear()
        elif now - self.looked_at >= LOAD_S and not busy:
            latest = {d.tier: d for d in snapshot.demand}
            load = {t: self._replicas(snapshot.step_times[self.pool.name], latest.get(t)) / max(n, 1) for t, n in counts.items()}
            needy, rich = max(load, key=lambda t: load[t]), min((t for t in load if counts[t] > 1), key=lambda t: load[t], default="")
            if rich and rich != needy and load[needy] > OVERLOAD and load[rich] < SPARE:
                wanted[needy], wanted[rich] = wanted[needy] + 1, wanted[rich] - 1
            self.looked_at = now
        if wanted != counts:
            layouts = _assign(self.pool, layouts, wanted)
        nodes = tuple(replace(n, layout=layouts[n.node.agent_id]) for n in snapshot.nodes)
        served = self._standing(replace(snapshot, nodes=nodes), now)
        return Plan("replicas", tuple(NodePlan(n.agent_id, n.residency, n.layout, FlipMode.LET_FINISH, math.inf) for n in served.nodes), ())

    def _counts(self, layouts: Mapping[str, Layout]) -> dict[str, int]:
        of = [g.engine_id.rpartition("@")[0] for la in layouts.values() for g in la.groups]
        return {t: of.count(t) for t in _judged(self.pool)[0]}

    def _replicas(self, model: StepTimeModel, d: TierDemand | None) -> float:
        """How many replicas a tier's load fills; many, where none would do."""
        if d is None or d.rate <= 0:
            return 0.0
        tier = self.pool.tier(d.tier)
        assert tier is not None
        rate, _, _ = safe_rate(model, self.tp_size, mixture((d,)), strictest((tier,)), (self.tp_size,))
        return d.rate / rate if rate > 0 else 1e3

    def _by_throughput(self, model: StepTimeModel, means: Mapping[str, TierDemand], total: int) -> dict[str, int]:
        names = _judged(self.pool)[0]
        need = {t: self._replicas(model, means.get(t)) for t in names}
        found = dict.fromkeys(names, 1)
        for _ in range(total - len(names)):
            short = max(names, key=lambda t: (need[t] / found[t], -names.index(t)))
            found[short] += 1
        return found
