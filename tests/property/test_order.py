"""Plans do not depend on the order of nodes, GPUs, groups, pools, tiers or demand, whichever plane makes them, nor at any tick of both."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.demand import TierDemand
from nitsum.layout import Layout
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, PlannerSettings, Snapshot
from nitsum.planner.capacity import Capacity
from nitsum.planner.fast import FastPlane
from nitsum.planner.planes import Planes
from nitsum.planner.slow import SlowPlane
from nitsum.pool import Pool, Tier
from nitsum.topology import Gpu, Node

T = TypeVar("T")
H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = (Tier("chat", 500, 20, weight=4), Tier("code", 500, 20, weight=4), Tier("agents", 1000, 40), Tier("night"), Tier("batch"))
POOLS = (Pool("default/a", "ua", "llama", TIERS, 10), Pool("default/b", "ub", "llama", (Tier("tight", 1000, 7), *TIERS[2:]), 9))


def fleet(*sizes: int) -> tuple[NodeView, ...]:
    """Two islands on each: of four GPUs, and of the rest."""
    return tuple(
        NodeView(Node(f"n{i}", tuple(Gpu(j, f"n{i}-{j}", island=j // 4) for j in range(n)), legal_tp={"llama": (1, 2, 4)}))
        for i, n in enumerate(sizes)
    )


def snapshot(nodes: tuple[NodeView, ...], now: float, rates: list[float]) -> Snapshot:
    """Two tiers of a pool are alike but for their names, as are two that are background."""
    demand = tuple(
        TierDemand(p.name, t.name, r, 0.1 * r, 1.0, 1500, 0.9, 200, 0.8, observed_at=now)
        for p in POOLS
        for t, r in zip(p.tiers, rates, strict=False)
    )
    knobs = PlannerSettings(cooldown_s=0.0)
    return Snapshot(POOLS, nodes, demand, {p.name: H100 for p in POOLS}, {p.name: H100 for p in POOLS}, knobs)


class Shuffled:
    """The same fleet and spec as another operator would list them: GPUs and tiers in an order of its own, the rest anew each time."""

    def __init__(self, seed: int) -> None:
        self.drawn = random.Random(seed)
        self.pools = [replace(p, tiers=self._mixed(p.tiers)) for p in POOLS]
        self.gpus: dict[str, tuple[Gpu, ...]] = {}

    def _mixed(self, xs: Sequence[T]) -> tuple[T, ...]:
        return tuple(self.drawn.sample(xs, len(xs)))

    def __call__(self, s: Snapshot) -> Snapshot:
        nodes = []
        for n in self._mixed(s.nodes):
            gpus = self.gpus.setdefault(n.node.agent_id, self._mixed(n.node.gpus))
            nodes.append(replace(n, node=replace(n.node, gpus=gpus), layout=Layout(self._mixed(n.layout.groups))))
        times = dict(self._mixed(list(s.step_times.items())))
        return replace(s, pools=self._mixed(self.pools), nodes=tuple(nodes), demand=self._mixed(s.demand), step_times=times)


def applied(nodes: tuple[NodeView, ...], p: Plan) -> tuple[NodeView, ...]:
    """With KV that differs from group to group."""
    wanted = [(n, w) for n in nodes if (w := p.node(n.node.agent_id))]
    tokens = {g.group_id: 1000 * len(g.group_id) + g.tp_size for _, w in wanted for g in w.layout.groups}
    return tuple(replace(n, residency=w.residency, layout=w.layout, resident_tokens=tokens) for n, w in wanted)


rates = st.lists(st.sampled_from([0.0, 1.0, 8.0, 25.0, 60.0]), min_size=5, max_size=5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(rates, min_size=1, max_size=3))
def test_both_planes_together_plan_the_same_tick_by_tick(seed: int, steps: list[list[float]]) -> None:
    one, other, mixed, nodes = Planes(), Planes(), Shuffled(seed), fleet(8, 6, 8)
    for i, of in enumerate(steps):
        for now in (10.0 * i, 10.0 * i + 1, 10.0 * i + 2):
            s = snapshot(nodes, now, of)
            plan = one(s, now)
            assert other(mixed(s), now) == plan
            nodes = applied(nodes, plan)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), rates, rates)
def test_each_plane_plans_the_same(seed: int, first: list[float], then: list[float]) -> None:
    nodes = applied(fleet(8, 6, 8), SlowPlane(governed=True)(snapshot(fleet(8, 6, 8), 0.0, first), 0.0))
    s, mixed = snapshot(nodes, 100.0, then), Shuffled(seed)
    assert SlowPlane(governed=True)(mixed(s), 100.0) == SlowPlane(governed=True)(s, 100.0)
    fast = FastPlane(Capacity(governed=True)), FastPlane(Capacity(governed=True))
    for _ in range(3):  # it looks at a few capacities anew in each second
        assert fast[0](mixed(s), 100.0) == fast[1](s, 100.0)
