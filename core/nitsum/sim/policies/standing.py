"""A planner that never changes a layout: shares and capacities of the groups that run follow demand, as the production planner's do."""

from dataclasses import replace
from statistics import NormalDist

from nitsum.demand import TierDemand
from nitsum.layout import Capacity, Group, Layout, Role, TierShare
from nitsum.objective import mixture, strictest
from nitsum.planner import NodePlan, Plan, Snapshot
from nitsum.planner.roles import safe_of
from nitsum.planner.v0 import PRIOR_RATE, QUEUE_PER_RUNNING

Served = tuple[tuple[TierShare, ...], Capacity]


NOISE = 0.05
"""Changes of a share or a capacity that are not worth a directive."""


def _about(g: Group, shares: tuple[TierShare, ...], capacity: Capacity) -> bool:
    if (
        abs(g.capacity.max_running - capacity.max_running) > NOISE * g.capacity.max_running
        or g.capacity.max_kv_tokens != capacity.max_kv_tokens
    ):
        return False
    return g.shares is shares or all(abs(a.share - b.share) <= NOISE and a.tier == b.tier for a, b in zip(g.shares, shares, strict=True))


def plan(snapshot: Snapshot, now: float) -> Plan:
    """Implements `Planner` for one pool."""
    (pool,) = snapshot.pools
    z = max(NormalDist().inv_cdf(snapshot.settings.headroom_quantile), 0.0)
    seen = {d.tier: d for d in snapshot.demand}
    demand = {t.name: seen.get(t.name, TierDemand(pool.name, t.name, 0.0)) for t in pool.tiers}
    demand = {t: replace(d, rate=max(d.rate + z * min(d.rate_stddev, d.rate), PRIOR_RATE)) for t, d in demand.items()}
    model = snapshot.step_times[pool.name]
    key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
    slo_tiers = sorted((t for t in pool.tiers if not t.background), key=key)
    known: dict[tuple[int, tuple[str, ...], Role], Served] = {}

    def served(group: Group) -> Served:
        names = tuple(s.tier for s in group.shares)
        key = group.tp_size, names, group.role
        if key not in known:
            members = tuple(t for t in slo_tiers if t.name in names)
            load = mixture(tuple(demand[t.name] for t in members))
            rate, batch = 0.0, 0
            for level in range(len(members)):  # the strictest targets are given up one by one where they cannot be held
                rate, _, batch = safe_of(group.role, model, group.tp_size, load, strictest(members[level:]), pool.allowed_tp)
                if rate > 0:
                    break
            running, total = max(batch, 1), sum(demand[t.name].rate for t in members)
            shares = tuple(TierShare(n, round(demand[n].rate / total, 3) if any(t.name == n for t in members) else 0.0) for n in names)
            kv_tokens = model.kv_capacity_tokens(group.tp_size, pool.allowed_tp)
            capacity = Capacity(running, kv_tokens, round(rate * load.prompt, 1), running * QUEUE_PER_RUNNING + 8)
            known[key] = shares, capacity
        return known[key]

    nodes = []
    for n in sorted(snapshot.nodes, key=lambda n: n.node.agent_id):
        groups = []
        for g in n.layout.groups:
            shares, capacity = served(g)
            groups.append(g if _about(g, shares, capacity) else replace(g, shares=shares, capacity=capacity))
        changed = any(new is not old for new, old in zip(groups, n.layout.groups, strict=True))
        nodes.append(NodePlan(n.node.agent_id, n.residency, Layout(tuple(groups)) if changed else n.layout))
    return Plan("standing", tuple(nodes), ())
