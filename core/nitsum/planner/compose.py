"""From decided groups to a Plan: layouts and residencies of nodes, shares and limits of groups.

Invariants: no GPU twice (Layout), engines of a layout are resident, and no pool above its budget at any instant: what it holds now counts
until it is gone, so what it gets elsewhere waits for the next plan where both together were too much, and what runs there stays until then.
"""

import hashlib
from dataclasses import replace

from nitsum.layout import Capacity as Limits
from nitsum.layout import Group, Layout, Role, TierShare
from nitsum.planner.affordable import affordable
from nitsum.planner.capacity import Capacity
from nitsum.planner.decided import Decided
from nitsum.planner.ending import Ending, Ends, mean_life_s, of_node
from nitsum.planner.limits import limits_of
from nitsum.planner.place import Placed
from nitsum.planner.split import Split
from nitsum.planner.types import NodePlan, NodeView, Plan, Snapshot
from nitsum.planner.warm import engine_id, residency_of, still

Known = dict[tuple[str, int, tuple[str, ...], Role, Split | None], tuple[tuple[TierShare, ...], Limits]]
"""Shares and limits of groups alike."""


def compose(decided: list[Decided], snapshot: Snapshot, capacity: Capacity, resident: bool = True) -> Plan:
    """`resident` False: which engines are warm stays as it is."""
    names = {p.name for p in snapshot.pools}
    decided, waiting, stays = affordable(decided, snapshot)
    by_node: dict[str, list[tuple[Decided, Placed]]] = {n.node.agent_id: [] for n in snapshot.nodes}
    for d in decided:
        for p in d.placed:
            by_node[p.agent_id].append((d, p))
    ordered = sorted(snapshot.nodes, key=lambda n: n.node.agent_id)
    wanted = {a: {(p.key[0], p.key[2]) for _, p in found} for a, found in by_node.items()}
    runs = {n.node.agent_id: {(g.pool, g.gpu_uuids): g for g in n.layout.groups} for n in ordered}
    changing = [
        n.node.agent_id
        for n in ordered
        if n.schedulable and not n.flipping and runs[n.node.agent_id] and runs[n.node.agent_id].keys() != wanted[n.node.agent_id]
    ]
    late = set(changing[max(snapshot.settings.flips_at_once_max - sum(n.flipping and n.schedulable for n in ordered), 0) :])
    limits: Known = {}
    nodes = []
    for n in ordered:
        agent_id = n.node.agent_id
        if not n.schedulable or agent_id in late:
            kept = n.layout.groups if agent_id in late else tuple(g for g in n.layout.groups if g.pool in names)
            nodes.append(NodePlan(agent_id, n.residency, Layout(kept)))
            continue
        groups = [
            runs[agent_id][p.pool, p.key[2]]
            if p.key in stays
            else _group(d, p, runs[agent_id].get((p.pool, p.key[2])), snapshot, limits, capacity)
            for d, p in by_node[agent_id]
        ]
        residency = residency_of(by_node[agent_id], n, groups) if resident else n.residency
        if waiting and resident:
            residency = still(residency, n, [p for ps in waiting.values() for p in ps if p.agent_id == agent_id], groups)
        layout = Layout(tuple(sorted(_paired(groups), key=lambda g: g.group_id)))
        how = _ending(n, layout, decided, snapshot)
        nodes.append(NodePlan(agent_id, residency, layout, how.mode, how.let_finish_s))
    return Plan(_digest(nodes), tuple(nodes), tuple(d.plan for d in decided))


def _ending(n: NodeView, layout: Layout, decided: list[Decided], snapshot: Snapshot) -> Ending:
    """How the streams of its groups that end are treated."""
    stays = {(g.group_id, g.gpu_uuids) for g in layout.groups}
    questions = {d.q.pool.name: d.q for d in decided}
    ends = []
    for g in n.layout.groups:
        if (g.group_id, g.gpu_uuids) not in stays and (q := questions.get(g.pool)) is not None:
            runs = {s.tier for s in g.shares}
            life = mean_life_s([t for t in q.pool.tiers if t.name in runs], q.demand)
            ends.append(Ends(g, n.resident_tokens.get(g.group_id, 0), life, snapshot.flip_costs[g.pool], q.tps))
    return of_node(ends, layout.groups)


def _paired(groups: list[Group]) -> list[Group]:
    """Where a block could come in part only, a group without its counterpart does both until the rest is there."""
    found = {(g.pool, g.role) for g in groups if g.role is not Role.MIXED}
    if not found:
        return groups
    whole = {pool for pool, _ in found if {(pool, Role.PREFILL), (pool, Role.DECODE)} <= found}
    return [g if g.role is Role.MIXED or g.pool in whole else replace(g, role=Role.MIXED) for g in groups]


def _digest(nodes: list[NodePlan]) -> str:
    """Of residencies and layouts, field by field: done each second for each group of a fleet, and dataclasses are slow to print."""
    printed: dict[tuple[tuple[TierShare, ...], Limits], int] = {}
    known: dict[tuple[int, int], int] = {}

    def number(g: Group) -> int:
        """Of its shares and limits, which many share."""
        if (found := known.get(same := (id(g.shares), id(g.capacity)))) is None:  # hashing what they hold takes longer
            found = known[same] = printed.setdefault((g.shares, g.capacity), len(printed))
        return found

    lines = []
    for n in nodes:
        lines.append(f"node {n.agent_id}")
        lines += [f"{e.engine_id} {e.model} {e.tp_size} {' '.join(e.gpu_uuids)}" for e in n.residency.engines]
        for g in n.layout.groups:
            where = " ".join(g.gpu_uuids)
            lines.append(f"group {g.group_id} {g.engine_id} {g.pool} {g.model} {g.tp_size} {g.role.value} {number(g)} {where}")
    lines.append(repr(list(printed)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _group(
    d: Decided,
    p: Placed,
    runs: Group | None,
    snapshot: Snapshot,
    known: Known,
    capacity: Capacity,
) -> Group:
    uuids = p.key[2]
    if runs is not None and (not runs.engine_id.endswith(d.q.mark) or runs.model != d.q.pool.model) and d.serving is not None:
        runs = None  # other weights on the same GPUs
    if runs is not None and d.serving is None:
        return runs
    if runs is not None and d.asleep:
        tiers = {t.name for t in d.q.pool.tiers}
        served = {s.tier for _, g in _groups_of(snapshot, p.pool) for s in g.shares}
        shares = tuple(s for s in runs.shares if s.tier in tiers) + tuple(TierShare(t, 0.0) for t in sorted(tiers - served))
        return replace(runs, shares=shares, role=p.role)
    assert d.serving is not None
    if (key := (p.pool, len(uuids), p.tiers, p.role, p.split)) not in known:
        known[key] = limits_of(d.q, d.serving, p, snapshot, capacity)
    shares, limits = known[key]
    if runs is not None:
        same = runs.shares == shares and runs.capacity == limits and runs.role is p.role
        return runs if same else _limited(runs, p.role, shares, limits)
    name = engine_id(d.q, p.gpus[0].index, len(uuids))
    return Group(name, name, p.pool, d.q.pool.model, len(uuids), uuids, p.role, shares, limits)


def _limited(group: Group, role: Role, shares: tuple[TierShare, ...], limits: Limits) -> Group:
    """As `replace`, which takes ten times as long: done for each group of a fleet, each second."""
    found = object.__new__(Group)
    found.__dict__.update(group.__dict__, role=role, shares=shares, capacity=limits)
    return found


def _groups_of(snapshot: Snapshot, pool: str) -> list[tuple[str, Group]]:
    return [(n.node.agent_id, g) for n in snapshot.nodes for g in n.layout.groups if g.pool == pool]
