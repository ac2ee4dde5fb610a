"""A planner that never changes a layout nor which tiers its groups serve: shares and limits follow demand, as the fast plane's do.

Groups that only prefill or only decode have the limits of `planner.roles`, which the planes do not decide about.
"""

from collections import Counter
from dataclasses import replace

from nitsum.layout import Capacity as Limits
from nitsum.layout import Group, Layout, Role
from nitsum.objective import mixture, strictest
from nitsum.planner import Plan, PoolPlan, Snapshot
from nitsum.planner.capacity import Capacity
from nitsum.planner.compose import Decided, as_placed, compose
from nitsum.planner.limits import queue
from nitsum.planner.question import PoolQuestion, ask, kinds
from nitsum.planner.roles import safe_of
from nitsum.planner.serve import as_labelled


def _in_role(q: PoolQuestion, snapshot: Snapshot, g: Group) -> Group:
    """The strictest targets are given up one by one where they cannot be held."""
    model, members = snapshot.step_times[q.pool.name], tuple(t for t in q.slo_tiers if any(t.name == s.tier for s in g.shares))
    load = mixture(tuple(q.demand[t.name] for t in members))
    found = (safe_of(g.role, model, g.tp_size, load, strictest(members[level:]), q.tps) for level in range(len(members)))
    rate, _, batch = next((f for f in found if f[0] > 0), (0.0, "", 0))
    running = max(batch, 1)
    prefill = round(rate * load.prompt, 1)
    limits = Limits(running, model.kv_capacity_tokens(g.tp_size, q.tps), prefill, queue(rate, None, running))
    return replace(g, capacity=limits)


class Standing:
    """Implements `Planner`. Remembers capacities."""

    def __init__(self) -> None:
        self._capacity = Capacity(governed=True)

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        decided, asked = [], {}
        for pool in sorted(snapshot.pools, key=lambda p: p.name):
            q = asked[pool.name] = ask(pool, snapshot)
            placed = as_placed(q)
            widths = Counter(len(p.gpus) for p in placed)
            serving = as_labelled(q, kinds(q, snapshot, self._capacity, tuple(sorted(widths))), placed)
            decided.append(Decided(q, serving.placed, serving, PoolPlan(pool.name, q.gpus, 0.0, (), ())))
        plan = compose(decided, snapshot, self._capacity, resident=False)
        if all(g.role is Role.MIXED for n in plan.nodes for g in n.layout.groups):
            return plan
        layouts = (
            Layout(tuple(g if g.role is Role.MIXED else _in_role(asked[g.pool], snapshot, g) for g in n.layout.groups)) for n in plan.nodes
        )
        return replace(plan, nodes=tuple(replace(n, layout=layout) for n, layout in zip(plan.nodes, layouts, strict=True)))
