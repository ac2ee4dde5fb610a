"""From a Snapshot to the slow plane's Problem: demand with headroom, kinds of groups with their rates, classes of equal nodes."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import NormalDist

from nitsum.attainment import MARGIN
from nitsum.demand import TierDemand
from nitsum.layout import Group, Role
from nitsum.perf import KvLoad
from nitsum.perf.memory import worth_residing
from nitsum.planner import offer
from nitsum.planner.capacity import Capacity, Mark, mark, version
from nitsum.planner.ending import ending, mean_life_s
from nitsum.planner.place import Key, Placed, Running
from nitsum.planner.problem import SURGES, Class, Counts, Kind, Problem, Want
from nitsum.planner.sharing import crowd_of, runs_of, work
from nitsum.planner.split import Shape, Split, read, shape_of
from nitsum.planner.types import NodeView, Snapshot
from nitsum.pool import Pool, Tier

PRIOR_RATE = 0.05
"""requests/s assumed of a tier nobody has asked for yet: enough to tell a layout that could serve it from one that could not."""


ALONE = 2
"""Times the groups that its own work would fill: among more a tier's arrivals are hardly spread, whoever shares them."""


@dataclass(frozen=True)
class PoolQuestion:
    """What does not change between answers for one pool."""

    pool: Pool
    demand: dict[str, TierDemand]
    """With headroom."""
    expected: dict[str, float]
    """requests/s without it; 0 of a tier nobody asks for."""
    tps: tuple[int, ...]
    """Degrees that are legal and worth being resident."""
    nodes: tuple[NodeView, ...]
    """Those that it may use."""
    running: Running
    """Groups that fit what is asked now: model, checkpoint, TP, nodes, budget."""
    had: Running
    """All of its groups on nodes that may be planned."""
    budget: int
    """GPUs that it may hold here: less what lost nodes may hold and what it still has on nodes that it may not use."""
    blocked: str = ""
    """Why nothing can be planned at all."""
    left_out: tuple[int, ...] = ()
    """Legal degrees whose weights would take the others' KV."""

    @cached_property
    def slo_tiers(self) -> tuple[Tier, ...]:
        """Strictest TPOT first; tiers without an SLO ride along and have no say."""
        key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
        return tuple(sorted((t for t in self.pool.tiers if not t.background), key=key))

    @cached_property
    def background(self) -> tuple[str, ...]:
        return tuple(sorted(t.name for t in self.pool.tiers if t.background))

    @property
    def gpus(self) -> int:
        return sum(len(key[2]) for key in self.running)

    @cached_property
    def splits(self) -> frozenset[Split]:
        """How its split blocks that run divide."""
        return frozenset(key[3] for key in self.running if key[3] is not None)

    @property
    def mark(self) -> str:
        """Ends every engine id: an engine of another checkpoint is another engine, also under the same model name."""
        return f"-{self.pool.checkpoint}" if self.pool.checkpoint else ""


def headroom(demand: TierDemand, quantile: float) -> TierDemand:
    """The rate's `quantile`; a tier nobody asked for yet counts with a prior."""
    return replace(demand, rate=max(demand.rate + _above(quantile) * min(demand.rate_stddev, demand.rate), PRIOR_RATE))


@cache
def _above(quantile: float) -> float:
    """Standard deviations above the mean; never below it."""
    return max(NormalDist().inv_cdf(quantile), 0.0)


def _degrees(pool: Pool, nodes: list[NodeView], allowed_by_profile: tuple[int, ...], widest: int) -> tuple[int, ...]:
    """Legal on all nodes that know the model; one that does not know it yet has no say."""
    legal = [set(n.node.legal_tp[pool.model]) for n in nodes if n.node.legal_tp.get(pool.model)]
    known = set.intersection(*legal) if legal else set()
    return tuple(t for t in sorted(known) if t <= widest and t in allowed_by_profile and (not pool.allowed_tp or t in pool.allowed_tp))


def _meant(g: Group) -> tuple[str, ...]:
    """Tiers that a group is for; those with a share of 0 ride along, those with the least are taken in (`limits.SHELTERED`)."""
    return tuple([s.tier for s in g.shares if s.share > 1.5e-3] or [s.tier for s in g.shares])


def _units(pool: str, n: NodeView, groups: list[Group]) -> list[tuple[Key, tuple[Group, ...]]]:
    """Of a pool's groups on a node: each split block as one, what belongs to none alone, whatever its role is."""
    if all([g.role is Role.MIXED for g in groups]):
        return [((pool, n.node.agent_id, g.gpu_uuids, None), (g,)) for g in groups]
    blocks = [
        ((pool, n.node.agent_id, tuple(u for g in members for u in g.gpu_uuids), split), members) for split, members in read(n.node, groups)
    ]
    inside = {g.group_id for _, members in blocks for g in members}
    return [*blocks, *(((pool, n.node.agent_id, g.gpu_uuids, None), (g,)) for g in groups if g.group_id not in inside)]


def _fits(pool: Pool, mark: str, nodes: list[NodeView], tps: tuple[int, ...], budget: int) -> Running:
    """Groups that may go on. Where they are more than the budget, those with the most KV; of a split block all or none in its roles."""
    found: list[tuple[int, Key, tuple[Group, ...]]] = []
    for n in nodes:
        here = {g.uuid for g in n.node.gpus}
        groups = [
            g
            for g in n.layout.groups
            if g.pool == pool.name and g.model == pool.model and g.engine_id.endswith(mark) and g.tp_size in tps
            if here.issuperset(g.gpu_uuids)
        ]
        for key, members in _units(pool.name, n, groups):
            found.append((-sum(n.resident_tokens.get(g.group_id, 0) for g in members), key, members))
    fits: dict[Key, tuple[str, ...]] = {}
    left = budget
    units = [(key, members) for _, key, members in sorted(found, key=lambda f: f[:2])]
    for key, members in units:  # grows
        if len(key[2]) <= left:
            fits[key] = _meant(members[0])
            left -= len(key[2])
        elif key[3] is not None:
            units += [((*key[:2], g.gpu_uuids, None), (g,)) for g in members]
    return dict(sorted(fits.items()))


def ask(pool: Pool, snapshot: Snapshot) -> PoolQuestion:
    ordered = sorted((n for n in snapshot.nodes if n.schedulable), key=lambda n: n.node.agent_id)
    matching = [n for n in ordered if set(pool.node_selector) <= set(n.node.labels)]
    inside = [n for n in matching if not n.leaving] or [n for n in matching if any(g.pool == pool.name for g in n.layout.groups)]
    agents = {n.node.agent_id for n in inside}
    had = {
        key: _meant(members[0])
        for n in ordered
        for key, members in _units(pool.name, n, [g for g in n.layout.groups if g.pool == pool.name])
    }
    away = {u for n in snapshot.nodes if n.node.agent_id not in agents for g in n.layout.groups if g.pool == pool.name for u in g.gpu_uuids}
    budget = max(pool.budget_gpus - len(away | set(snapshot.holds.get(pool.name, ()))), 0)
    runs_here = {key[1] for key in had}
    nodes = [n for n in inside if n.node.legal_tp.get(pool.model) or n.node.agent_id in runs_here]
    times = snapshot.step_times[pool.name]
    legal = _degrees(pool, nodes, times.tp_sizes, min(max((len(n.node.gpus) for n in nodes), default=0), budget))
    tps = worth_residing(times, legal)
    blocked = ""
    if not inside or not budget:
        blocked = "no GPU within budget and selector"
    elif not tps:
        blocked = f"no legal TP among {list(pool.allowed_tp) or 'any'}"
    if inside:  # where no node fits at all, what runs stays; else it makes room in the budget for the nodes that do
        had = {key: tiers for key, tiers in had.items() if key[1] in agents}
    seen = {d.tier: d for d in snapshot.demand if d.pool == pool.name}
    quantile = snapshot.settings.headroom_quantile
    demand = {t.name: headroom(seen.get(t.name, TierDemand(pool.name, t.name, 0.0)), quantile) for t in pool.tiers}
    mark = f"-{pool.checkpoint}" if pool.checkpoint else ""
    running = had if blocked else _fits(pool, mark, nodes, tps, budget)
    expected = {t.name: seen[t.name].rate if t.name in seen else 0.0 for t in pool.tiers}
    return PoolQuestion(pool, demand, expected, tps, tuple(nodes), running, had, budget, blocked, tuple(t for t in legal if t not in tps))


def stale(pool: str, snapshot: Snapshot, now: float) -> bool:
    """Whether its demand is not known, or all reports of it are old."""
    known = [d for d in snapshot.demand if d.pool == pool]
    return not known or all(now - d.observed_at > snapshot.settings.stale_after_s for d in known)


def kinds(question: PoolQuestion, snapshot: Snapshot, capacity: Capacity, stand: Mapping[int, int] | None = None) -> tuple[Kind, ...]:
    """Runs of neighbours in strictness (few, or all), at every TP. A pool without SLOs has one kind per TP for its background tiers.
    Then split blocks: those that run, and without `stand` those that are worth it (`offer`).

    `stand`: how many groups of which TP there are, where that is settled: a tier is spread over no more than those.
    """
    pool, tiers = question.pool, question.slo_tiers
    model = snapshot.step_times[pool.name]
    marks = {t.name: mark(question.demand[t.name]) for t in tiers}
    runs = runs_of(tiers)
    prompts = {n: (m.prompt, m.prompt_spread) for n, m in marks.items()}
    known = capacity.kinds(pool.name, (version(model), question.tps, tiers))
    numbers = {name: capacity.number(m) for name, m in marks.items()}
    lengths = [tuple([numbers[t] for t, _, _ in sharing]) for sharing in runs]
    found: list[Kind | None] = []
    for tp_size in question.tps if stand is None else sorted(stand):
        works = {t.name: work(question.demand[t.name], model, tp_size) for t in tiers}
        whole, groups = sum(works.values()), question.budget // tp_size if stand is None else stand[tp_size]
        alone = {t: ALONE * crowd_of(groups, part / whole) for t, part in works.items()}
        for sharing, length in zip(runs, lengths, strict=True):
            crowd = crowd_of(groups, sum([works[t] for t, _, _ in sharing]) / whole)
            crowds = tuple([min(crowd, alone[t]) for t, _, _ in sharing])
            key = tp_size, crowds, sharing[0][0], length
            if (before := known.get(key)) is not None and (before[1] or capacity.left == 0):
                found.append(before[0])
                continue
            capacity.guessed = False
            safe = [
                capacity.of(model, tp_size, whose, marks[t], goal, question.tps, prompts.get(guest), len(sharing) == 1, among)
                for (t, goal, guest), among in zip(sharing, crowds, strict=True)
                for whose in [f"{pool.name}/{t}/{guest}"]
            ]
            kind = None
            if len(sharing) == 1 or all(s.rate for s in safe):  # else fewer share it as well
                names = tuple(t for t, _, _ in sharing)
                rates, binding, batches = tuple(s.rate for s in safe), tuple(s.binding for s in safe), tuple(s.batch for s in safe)
                attained = tuple(s.attained for s in safe)
                kind = Kind(pool.name, tp_size, names, rates, binding, batches, safe[0].partly if len(safe) == 1 else None, None, attained)
            found.append(kind)
            known[key] = kind, not capacity.guessed
        if not tiers:
            found.append(Kind(pool.name, tp_size, (), ()))
    mixed = tuple(k for k in found if k is not None)
    return mixed + _blocks(question, snapshot, capacity, marks, mixed if stand is None else None)


def standing(placed: Iterable[Placed]) -> Mapping[int, int]:
    """Groups by TP, those of split blocks left out."""
    return Counter(len(p.gpus) for p in placed if p.split is None)


def _blocks(
    q: PoolQuestion, snapshot: Snapshot, capacity: Capacity, marks: dict[str, Mark], mixed: tuple[Kind, ...] | None
) -> tuple[Kind, ...]:
    """Kinds of split blocks. `mixed` None: only of those that run."""
    if not q.slo_tiers or (mixed is None and not q.splits):
        return ()
    name, cost = q.pool.name, snapshot.flip_costs[q.pool.name]
    load = cost if isinstance(cost, KvLoad) else None
    rates, gpus = {t.name: q.demand[t.name].rate for t in q.slo_tiers}, max(len(n.node.gpus) for n in q.nodes)
    asked = offer.Asked(name, q.slo_tiers, marks, rates, q.tps, q.budget, gpus, snapshot.step_times[name], load)
    return offer.kinds(asked, capacity, mixed if load is not None else None, q.splits)


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


def nearest(problem_kinds: tuple[Kind, ...], pool: str, shape: Shape, tiers: Collection[str]) -> int | None:
    """The kind whose tiers are most like these."""
    asked = frozenset(tiers)
    same = [(i, k.members) for i, k in enumerate(problem_kinds) if k.shape == shape and k.pool == pool]
    alike = next((i for i, members in same if members == asked), None)
    if alike is not None or not same:
        return alike
    return max(same, key=lambda of: (len(asked & of[1]) - 0.5 * len(of[1] - asked), -of[0]))[0]


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


def wants(question: PoolQuestion, surge_max: float = SURGES[-1][0]) -> list[Want]:
    """What surely comes is what groups can serve at all, who are rated at MARGIN of it."""
    d, name = question.demand, question.pool.name
    sure = {t.name: MARGIN * max(question.expected[t.name], PRIOR_RATE) for t in question.slo_tiers}
    return [Want(name, t.name, d[t.name].rate, t.target, t.weight, surge_max, sure[t.name]) for t in question.slo_tiers]


def sizes_of(of: tuple[Kind, ...]) -> set[int]:
    return {k.tp_size for k in of if k.split is not None}


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
