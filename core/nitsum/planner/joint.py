"""Several pools as one Problem: kinds of groups, classes of equal nodes, what runs as counts, and what a switch loses."""

from collections.abc import Collection

from nitsum.planner.capacity import Capacity
from nitsum.planner.ending import ending, mean_life_s
from nitsum.planner.kinds import kinds, nearest, sizes_of
from nitsum.planner.place import Running
from nitsum.planner.problem import Class, Counts, Kind, Problem
from nitsum.planner.question import PoolQuestion, wants
from nitsum.planner.split import Shape, shape_of
from nitsum.planner.types import NodeView, Snapshot


def classes(questions: list[PoolQuestion], barred: frozenset[str], sizes: Collection[int] = ()) -> tuple[list[Class], list[list[NodeView]]]:
    """Nodes that no answer can tell apart, in the order of their first one's name. `sizes`: of split blocks, in GPUs."""
    tps = sorted({t for q in questions for t in q.tps} | set(sizes))
    by_mark: dict[object, list[NodeView]] = {}
    nodes = {n.node.agent_id: n for q in questions for n in q.nodes}
    used: dict[str, set[str]] = {}
    for q in questions:
        for n in q.nodes:
            used.setdefault(n.node.agent_id, set()).add(q.pool.name)
    for agent_id in sorted(nodes):
        n = nodes[agent_id]
        pools = frozenset(used[agent_id])
        own = barred & {g.uuid for g in n.node.gpus} if barred else barred
        if own:
            blocks = tuple((t, sum(own.isdisjoint([g.uuid for g in b]) for b in n.node.blocks(t))) for t in tps)
        else:
            blocks = tuple((t, len(n.node.blocks(t))) for t in tps)
        free = len(n.node.gpus) - len(own)
        by_mark.setdefault((pools, blocks, free, tuple(sorted({g.type for g in n.node.gpus}))), []).append(n)
    members = list(by_mark.values())
    marks = list(by_mark)
    return [Class(len(m), mark[2], mark[0], dict(mark[1])) for mark, m in zip(marks, members, strict=True)], members  # type: ignore[index]


def counts_of(problem_kinds: tuple[Kind, ...], members: list[list[NodeView]], running: Running) -> Counts:
    """Groups as counts of the kinds whose tiers are nearest."""
    at = {n.node.agent_id: c for c, nodes in enumerate(members) for n in nodes}
    known: dict[tuple[str, Shape, tuple[str, ...]], int | None] = {}
    counts: Counts = {}
    for (pool, agent_id, uuids, split), tiers in running.items():
        mark = pool, shape_of(len(uuids), split), tiers
        if mark not in known:
            known[mark] = nearest(problem_kinds, *mark)
        if (k := known[mark]) is not None and agent_id in at:
            counts[at[agent_id], k] = counts.get((at[agent_id], k), 0) + 1
    return counts


def flip_loss(question: PoolQuestion, snapshot: Snapshot, score: float, dwell_s: float) -> dict[tuple[str, int], float]:
    """Score lost per GPU that changes to a TP: what a GPU earns now x pause / expected dwell."""
    groups = [g for n in question.nodes for g in n.layout.groups if g.pool == question.pool.name]
    if not groups or not question.gpus:
        return {}
    tokens = sum(n.resident_tokens.get(g.group_id, 0) for n in question.nodes for g in n.layout.groups if g.pool == question.pool.name)
    cost = snapshot.flip_costs[question.pool.name]
    widths = [g.tp_size for g in groups]
    usual, each = max(sorted(set(widths)), key=widths.count), tokens // len(groups)
    lost, life = score / question.gpus / dwell_s, mean_life_s(question.slo_tiers, question.demand)
    return {(question.pool.name, tp): ending(each, usual, tp, life, cost).lost_ms / 1e3 * lost for tp in question.tps}


def problem(
    questions: list[PoolQuestion], snapshot: Snapshot, capacity: Capacity, barred: frozenset[str]
) -> tuple[Problem, list[list[NodeView]], Counts]:
    """The joint question of several pools, the nodes of each class, and what runs as counts."""
    all_kinds = tuple(k for q in questions for k in kinds(q, snapshot, capacity))
    found, members = classes(questions, barred, sizes_of(all_kinds))
    running: Running = {key: tiers for q in questions for key, tiers in q.running.items()}
    counts = counts_of(all_kinds, members, running)
    runs: dict[tuple[int, str, Shape], int] = {}
    for (c, k), n in counts.items():
        key = c, all_kinds[k].pool, all_kinds[k].shape
        runs[key] = runs.get(key, 0) + n
    budgets = {q.pool.name: q.budget for q in questions}
    return Problem(tuple(w for q in questions for w in wants(q)), all_kinds, tuple(found), budgets, runs), members, counts
