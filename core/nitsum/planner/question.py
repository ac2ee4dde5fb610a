"""From a Snapshot to the slow plane's Problem: demand with headroom, kinds of groups with their rates, classes of equal nodes."""

from dataclasses import dataclass, replace
from statistics import NormalDist

from nitsum.demand import TierDemand
from nitsum.layout import FlipMode
from nitsum.objective import Targets, mixture
from nitsum.planner.capacity import Capacity
from nitsum.planner.place import Running
from nitsum.planner.problem import Class, Counts, Kind, Problem, Want
from nitsum.planner.types import NodeView, Snapshot
from nitsum.pool import Pool, Tier

PRIOR_RATE = 0.05
"""requests/s assumed of a tier nobody has asked for yet: enough to tell a layout that could serve it from one that could not."""
PRIOR_PROMPT, PRIOR_OUTPUT = 256.0, 128.0


@dataclass(frozen=True)
class PoolQuestion:
    """What does not change between answers for one pool."""

    pool: Pool
    demand: dict[str, TierDemand]
    """With headroom."""
    tps: tuple[int, ...]
    nodes: tuple[NodeView, ...]
    """Those that it may use."""
    running: Running

    @property
    def slo_tiers(self) -> tuple[Tier, ...]:
        """Strictest TPOT first; tiers without an SLO ride along and have no say."""
        key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
        return tuple(sorted((t for t in self.pool.tiers if not t.background), key=key))

    @property
    def background(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.pool.tiers if t.background)

    @property
    def gpus(self) -> int:
        return sum(len(uuids) for _, _, uuids in self.running)


def headroom(demand: TierDemand, quantile: float) -> TierDemand:
    """The rate's `quantile`; a tier nobody asked for yet counts with a prior."""
    z = max(NormalDist().inv_cdf(quantile), 0.0)
    return replace(demand, rate=max(demand.rate + z * min(demand.rate_stddev, demand.rate), PRIOR_RATE))


def ask(pool: Pool, snapshot: Snapshot) -> PoolQuestion:
    nodes = tuple(
        n for n in sorted(snapshot.nodes, key=lambda n: n.node.agent_id) if n.schedulable and set(pool.node_selector) <= set(n.node.labels)
    )
    times = snapshot.step_times[pool.name]
    legal = [set(n.node.legal_tp.get(pool.model, ())) for n in nodes]
    widest = max((len(n.node.gpus) for n in nodes), default=0)
    known = set.intersection(*legal) if legal else set()
    tps = tuple(t for t in sorted(known) if t <= widest and t in times.tp_sizes and (not pool.allowed_tp or t in pool.allowed_tp))
    seen = {d.tier: d for d in snapshot.demand if d.pool == pool.name}
    quantile = snapshot.settings.headroom_quantile
    demand = {t.name: headroom(seen.get(t.name, TierDemand(pool.name, t.name, 0.0)), quantile) for t in pool.tiers}
    running = {
        (pool.name, n.node.agent_id, g.gpu_uuids): tuple(s.tier for s in g.shares)
        for n in snapshot.nodes
        for g in n.layout.groups
        if g.pool == pool.name
    }
    return PoolQuestion(pool, demand, tps, nodes, running)


def targets_of(tiers: tuple[Tier, ...]) -> Targets:
    return Targets(
        min((t.ttft_ms for t in tiers if t.ttft_ms is not None), default=None),
        min((t.tpot_ms for t in tiers if t.tpot_ms is not None), default=None),
    )


def kinds(question: PoolQuestion, snapshot: Snapshot, capacity: Capacity) -> tuple[Kind, ...]:
    """Every run of neighbours in strictness, at every TP. A pool without SLOs has one kind per TP for its background tiers."""
    pool, tiers = question.pool, question.slo_tiers
    model = snapshot.step_times[pool.name]
    name = str(getattr(model, "name", id(model)))
    found = []
    for tp_size in question.tps:
        for first in range(len(tiers)):
            for last in range(first + 1, len(tiers) + 1):
                members = tiers[first:last]
                targets = targets_of(members)
                rates, binding = [], []
                for t in members:
                    d = question.demand[t.name]
                    prompt, output = d.prompt_tokens_mean or PRIOR_PROMPT, d.output_tokens_mean or PRIOR_OUTPUT
                    rate, limit, _ = capacity.of(model, name, tp_size, prompt, output, targets, question.tps)
                    rates.append(rate)
                    binding.append(limit)
                found.append(Kind(pool.name, tp_size, tuple(t.name for t in members), tuple(rates), tuple(binding)))
        if not tiers:
            found.append(Kind(pool.name, tp_size, (), ()))
    return tuple(found)


def batch_of(
    question: PoolQuestion, snapshot: Snapshot, capacity: Capacity, tp_size: int, tiers: tuple[str, ...]
) -> tuple[int, float, float]:
    """(requests that may run at once, safe requests/s, mean prompt) of a group that serves a mix of these tiers."""
    members = tuple(t for t in question.slo_tiers if t.name in tiers)
    model = snapshot.step_times[question.pool.name]
    if not members:
        return 0, 0.0, 0.0
    load = mixture(tuple(question.demand[t.name] for t in members))
    name = str(getattr(model, "name", id(model)))
    rate, _, batch = capacity.of(model, name, tp_size, load.prompt, load.output, targets_of(members), question.tps)
    return batch, rate, load.prompt


def classes(questions: list[PoolQuestion], barred: frozenset[str]) -> tuple[list[Class], list[list[NodeView]]]:
    """Nodes that no answer can tell apart, in the order of their first one's name."""
    tps = sorted({t for q in questions for t in q.tps})
    by_mark: dict[object, list[NodeView]] = {}
    nodes = {n.node.agent_id: n for q in questions for n in q.nodes}
    for agent_id in sorted(nodes):
        n = nodes[agent_id]
        pools = frozenset(q.pool.name for q in questions if any(m.node.agent_id == agent_id for m in q.nodes))
        blocks = tuple((t, sum(not barred & {g.uuid for g in b} for b in n.node.blocks(t))) for t in tps)
        free = sum(g.uuid not in barred for g in n.node.gpus)
        by_mark.setdefault((pools, blocks, free, tuple(sorted({g.type for g in n.node.gpus}))), []).append(n)
    members = list(by_mark.values())
    marks = list(by_mark)
    return [Class(len(m), mark[2], mark[0], dict(mark[1])) for mark, m in zip(marks, members, strict=True)], members  # type: ignore[index]


def running_counts(
    problem_kinds: tuple[Kind, ...], members: list[list[NodeView]], running: Running
) -> tuple[Counts, dict[tuple[int, str, int], int]]:
    """What runs, as counts of the kinds whose tiers are nearest, and by (class, pool, TP)."""
    at = {n.node.agent_id: c for c, nodes in enumerate(members) for n in nodes}
    counts: Counts = {}
    runs: dict[tuple[int, str, int], int] = {}
    for (pool, agent_id, uuids), tiers in running.items():
        same = [i for i, k in enumerate(problem_kinds) if (k.pool, k.tp_size) == (pool, len(uuids))]
        if agent_id not in at or not same:
            continue
        c = at[agent_id]
        runs[c, pool, len(uuids)] = runs.get((c, pool, len(uuids)), 0) + 1
        nearest = max(
            same, key=lambda i: (len(set(problem_kinds[i].tiers) & set(tiers)) - 0.5 * len(set(problem_kinds[i].tiers) - set(tiers)), -i)
        )
        counts[c, nearest] = counts.get((c, nearest), 0) + 1
    return counts, runs


def flip_loss(question: PoolQuestion, snapshot: Snapshot, score: float) -> float:
    """Score lost per GPU that changes its TP: what a GPU earns now x pause / expected dwell."""
    groups = [g for n in question.nodes for g in n.layout.groups if g.pool == question.pool.name]
    if not groups or not question.gpus:
        return 0.0
    tokens = sum(n.resident_tokens.get(g.group_id, 0) for n in question.nodes for g in n.layout.groups if g.pool == question.pool.name)
    cost = snapshot.flip_costs[question.pool.name]
    widths = [g.tp_size for g in groups]
    pause_ms = max(cost.pause_ms(tokens // len(groups), FlipMode.ABORT, max(set(widths), key=widths.count), tp) for tp in question.tps)
    return pause_ms / 1e3 / snapshot.settings.dwell_s * score / question.gpus


def wants(question: PoolQuestion) -> list[Want]:
    d = question.demand
    return [Want(question.pool.name, t.name, d[t.name].rate, t.target, t.weight) for t in question.slo_tiers]


def problem(
    questions: list[PoolQuestion], snapshot: Snapshot, capacity: Capacity, barred: frozenset[str]
) -> tuple[Problem, list[list[NodeView]], Counts]:
    """The joint question of several pools, the nodes of each class, and what runs as counts."""
    all_kinds = tuple(k for q in questions for k in kinds(q, snapshot, capacity))
    found, members = classes(questions, barred)
    running: Running = {key: tiers for q in questions for key, tiers in q.running.items()}
    counts, runs = running_counts(all_kinds, members, running)
    budgets = {q.pool.name: max(q.pool.budget_gpus - len(set(snapshot.holds.get(q.pool.name, ()))), 0) for q in questions}
    return Problem(tuple(w for q in questions for w in wants(q)), all_kinds, tuple(found), budgets, runs), members, counts
