"""A planner that never changes a layout nor which tiers its groups serve: shares and limits follow demand, as the fast plane's do.

Also of groups that only prefill or only decode, whether they make up split blocks as the planes know them or not.
"""

from dataclasses import replace

from nitsum.layout import Group, Layout, Role
from nitsum.objective import mixture, strictest
from nitsum.planner import Plan, PoolPlan, Snapshot
from nitsum.planner.capacity import Capacity
from nitsum.planner.compose import compose
from nitsum.planner.decided import Decided, as_placed
from nitsum.planner.kinds import kinds, standing
from nitsum.planner.limits import Block
from nitsum.planner.question import PoolQuestion, ask
from nitsum.planner.serve import as_labelled
from nitsum.planner.split import Split


def _in_role(q: PoolQuestion, snapshot: Snapshot, g: Group, role: Role, capacity: Capacity) -> Group:
    """By the means of its tiers, as if it were half of a block."""
    model, members = snapshot.step_times[q.pool.name], tuple(t for t in q.slo_tiers if any(t.name == s.tier for s in g.shares))
    load, targets = mixture(tuple(q.demand[t.name] for t in members)), strictest(members)
    split, cost = Split(1, g.tp_size, 1, g.tp_size), snapshot.flip_costs[q.pool.name]
    block = Block(capacity, model, split, q.tps, load.prompt, load.output, targets.ttft_ms, targets.tpot_ms, cost)
    return replace(g, role=role, capacity=block.prefill() if role is Role.PREFILL else block.decode())


class Standing:
    """Implements `Planner`. Remembers capacities."""

    def __init__(self) -> None:
        self._capacity = Capacity(governed=True)

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        decided, asked = [], {}
        for pool in sorted(snapshot.pools, key=lambda p: p.name):
            q = asked[pool.name] = ask(pool, snapshot)
            placed = as_placed(q)
            serving = as_labelled(q, kinds(q, snapshot, self._capacity, standing(placed)), placed)
            decided.append(Decided(q, serving.placed, serving, PoolPlan(pool.name, q.gpus, 0.0, (), ())))
        plan = compose(decided, snapshot, self._capacity, resident=False)
        roles = {(n.node.agent_id, g.group_id): g.role for n in snapshot.nodes for g in n.layout.groups if g.role is not Role.MIXED}
        if not roles:
            return plan

        def kept(agent_id: str, g: Group) -> Group:
            role = roles.get((agent_id, g.group_id), g.role)
            return g if g.role is role else _in_role(asked[g.pool], snapshot, g, role, self._capacity)

        nodes = (replace(n, layout=Layout(tuple(kept(n.agent_id, g) for g in n.layout.groups))) for n in plan.nodes)
        return replace(plan, nodes=tuple(nodes))
