"""From a Snapshot to the slow plane's Problem: demand with headroom, kinds of groups with their rates, classes of equal nodes."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from statistics import NormalDist

from nitsum.attainment import Goal
from nitsum.demand import TierDemand
from nitsum.layout import FlipMode, Group
from nitsum.perf import StepTimeModel
from nitsum.perf.memory import worth_residing
from nitsum.planner.capacity import PRIOR_OUTPUT, PRIOR_PROMPT, Capacity, mark, version
from nitsum.planner.place import Running
from nitsum.planner.problem import SURGES, Class, Counts, Kind, Problem, Want
from nitsum.planner.types import NodeView, Snapshot
from nitsum.pool import Pool, Tier

PRIOR_RATE = 0.05
"""requests/s assumed of a tier nobody has asked for yet: enough to tell a layout that could serve it from one that could not."""
BATCH = 32
SPARED = 1.0
"""Of the misses that a tier's target allows, those that a plan counts on: the rest is for what estimates do not see."""
MIXED_MAX = 3
"""Neighbouring tiers that may share groups, unless all do: more sorts of groups cost time and gain nothing."""


@dataclass(frozen=True)
class PoolQuestion:
    """What does not change between answers for one pool."""

    pool: Pool
    demand: dict[str, TierDemand]
    """With headroom."""
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
        return tuple(t.name for t in self.pool.tiers if t.background)

    @property
    def gpus(self) -> int:
        return sum(len(uuids) for _, _, uuids in self.running)

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
    """Tiers that a group is for; those with a share of 0 ride along, those with the least are taken in (`compose.SHELTERED`)."""
    return tuple([s.tier for s in g.shares if s.share > 1.5e-3] or [s.tier for s in g.shares])


def _fits(pool: Pool, mark: str, nodes: list[NodeView], tps: tuple[int, ...], budget: int) -> Running:
    """Groups that may go on. Where they are more than the budget, those with the most KV."""
    found = []
    for n in nodes:
        here = {g.uuid for g in n.node.gpus}
        for g in n.layout.groups:
            same = g.pool == pool.name and g.model == pool.model and g.engine_id.endswith(mark)
            if same and g.tp_size in tps and here.issuperset(g.gpu_uuids):
                key = pool.name, n.node.agent_id, g.gpu_uuids
                found.append((-n.resident_tokens.get(g.group_id, 0), key, _meant(g)))
    fits: dict[tuple[str, str, tuple[str, ...]], tuple[str, ...]] = {}
    left = budget
    for _, key, tiers in sorted(found):
        if len(key[2]) <= left:
            fits[key] = tiers
            left -= len(key[2])
    return dict(sorted(fits.items()))


def ask(pool: Pool, snapshot: Snapshot) -> PoolQuestion:
    ordered = sorted((n for n in snapshot.nodes if n.schedulable), key=lambda n: n.node.agent_id)
    matching = [n for n in ordered if set(pool.node_selector) <= set(n.node.labels)]
    inside = [n for n in matching if not n.leaving] or [n for n in matching if any(g.pool == pool.name for g in n.layout.groups)]
    agents = {n.node.agent_id for n in inside}
    had: dict[tuple[str, str, tuple[str, ...]], tuple[str, ...]] = {
        (pool.name, n.node.agent_id, g.gpu_uuids): _meant(g) for n in ordered for g in n.layout.groups if g.pool == pool.name
    }
    away = {u for n in snapshot.nodes if n.node.agent_id not in agents for g in n.layout.groups if g.pool == pool.name for u in g.gpu_uuids}
    budget = max(pool.budget_gpus - len(away | set(snapshot.holds.get(pool.name, ()))), 0)
    runs_here = {a for _, a, _ in had}
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
    return PoolQuestion(pool, demand, tps, tuple(nodes), running, had, budget, blocked, tuple(t for t in legal if t not in tps))


def stale(pool: str, snapshot: Snapshot, now: float) -> bool:
    """Whether its demand is not known, or all reports of it are old."""
    known = [d for d in snapshot.demand if d.pool == pool]
    return not known or all(now - d.observed_at > snapshot.settings.stale_after_s for d in known)


def goal_of(tier: Tier, members: tuple[Tier, ...] = ()) -> tuple[Goal, str]:
    """What must hold of a tier in a group that these share, and the tier whose TTFT suffers most there, if another.

    All decode in the same steps, so the strictest TPOT is everyone's; prompts wait for each other, but each has its own TTFT.
    """
    share = max(1 - SPARED * (1 - t.target) for t in (tier, *members))
    tpot = min((t.tpot_ms for t in (tier, *members) if t.tpot_ms is not None), default=None)
    guest = min((t for t in members if t.ttft_ms is not None and t != tier), key=lambda t: (t.ttft_ms, t.name), default=None)
    if guest is None or (tier.ttft_ms is not None and (guest.ttft_ms or 0.0) > tier.ttft_ms):
        return Goal(tier.ttft_ms, tpot, share), ""
    return Goal(tier.ttft_ms, tpot, share, guest.ttft_ms), guest.name


def work(d: TierDemand, model: StepTimeModel, tp_size: int) -> float:
    """Of a group's time, what a tier takes at a moderate batch; only compared with that of other tiers."""
    prompt, output = d.prompt_tokens_mean or PRIOR_PROMPT, d.output_tokens_mean or PRIOR_OUTPUT
    decode_ms = model.decode_ms(tp_size, BATCH, int(prompt + output / 2)) / BATCH
    return d.rate * (model.prefill_ms(tp_size, max(int(prompt), 1)) + output * decode_ms)


def _crowd(groups: int, part: float) -> int:
    """Groups among which the arrivals of tiers are spread that make this part of the work; a power of 2, so as not to tremble."""
    return 1 << max(int(groups * part + 0.25).bit_length() - 1, 0)


@lru_cache(maxsize=256)
def _runs(tiers: tuple[Tier, ...]) -> tuple[tuple[tuple[str, Goal, str], ...], ...]:
    """Tiers that may share groups: of each run of neighbours, (tier, its goal there, the tier whose TTFT suffers)."""
    runs = [
        tiers[first:last]
        for first in range(len(tiers))
        for last in range(first + 1, len(tiers) + 1)
        if last - first <= MIXED_MAX or last - first == len(tiers)
    ]
    return tuple(tuple((t.name, *goal_of(t, members)) for t in members) for members in runs)


def kinds(question: PoolQuestion, snapshot: Snapshot, capacity: Capacity, tps: tuple[int, ...] | None = None) -> tuple[Kind, ...]:
    """Runs of neighbours in strictness (few, or all), at every TP. A pool without SLOs has one kind per TP for its background tiers."""
    pool, tiers = question.pool, question.slo_tiers
    model = snapshot.step_times[pool.name]
    marks = {t.name: mark(question.demand[t.name]) for t in tiers}
    runs = _runs(tiers)
    prompts = {n: (m.prompt, m.prompt_spread) for n, m in marks.items()}
    known = capacity.kinds(pool.name, (version(model), question.tps, tiers))
    numbers = {name: capacity.number(m) for name, m in marks.items()}
    lengths = [tuple([numbers[t] for t, _, _ in sharing]) for sharing in runs]
    found: list[Kind | None] = []
    for tp_size in question.tps if tps is None else tps:
        works = {t.name: work(question.demand[t.name], model, tp_size) for t in tiers}
        whole, groups = sum(works.values()), question.budget // tp_size
        for sharing, length in zip(runs, lengths, strict=True):
            crowd = _crowd(groups, sum([works[t] for t, _, _ in sharing]) / whole)
            key = tp_size, crowd, sharing[0][0], length
            if (before := known.get(key)) is not None and (before[1] or capacity.left == 0):
                found.append(before[0])
                continue
            capacity.guessed = False
            safe = [
                capacity.of(model, tp_size, whose, marks[t], goal, question.tps, prompts.get(guest), len(sharing) == 1, crowd)
                for t, goal, guest in sharing
                for whose in [f"{pool.name}/{t}/{guest}"]
            ]
            kind = None
            if len(sharing) == 1 or all(s.rate for s in safe):  # else fewer share it as well
                names = tuple(t for t, _, _ in sharing)
                rates, binding, batches = tuple(s.rate for s in safe), tuple(s.binding for s in safe), tuple(s.batch for s in safe)
                kind = Kind(pool.name, tp_size, names, rates, binding, batches, safe[0].partly if len(safe) == 1 else None)
            found.append(kind)
            known[key] = kind, not capacity.guessed
        if not tiers:
            found.append(Kind(pool.name, tp_size, (), ()))
    return tuple(k for k in found if k is not None)


def classes(questions: list[PoolQuestion], barred: frozenset[str]) -> tuple[list[Class], list[list[NodeView]]]:
    """Nodes that no answer can tell apart, in the order of their first one's name."""
    tps = sorted({t for q in questions for t in q.tps})
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


def nearest(problem_kinds: tuple[Kind, ...], pool: str, tp_size: int, tiers: Collection[str]) -> int | None:
    """The kind whose tiers are most like these."""
    asked = frozenset(tiers)
    same = [(i, k.members) for i, k in enumerate(problem_kinds) if k.tp_size == tp_size and k.pool == pool]
    alike = next((i for i, members in same if members == asked), None)
    if alike is not None or not same:
        return alike
    return max(same, key=lambda of: (len(asked & of[1]) - 0.5 * len(of[1] - asked), -of[0]))[0]


def counts_of(problem_kinds: tuple[Kind, ...], members: list[list[NodeView]], running: Running) -> Counts:
    """Groups as counts of the kinds whose tiers are nearest."""
    at = {n.node.agent_id: c for c, nodes in enumerate(members) for n in nodes}
    known: dict[tuple[str, int, tuple[str, ...]], int | None] = {}
    counts: Counts = {}
    for (pool, agent_id, uuids), tiers in running.items():
        mark = pool, len(uuids), tiers
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
    lost = score / question.gpus / dwell_s
    return {(question.pool.name, tp): cost.pause_ms(each, FlipMode.ABORT, usual, tp) / 1e3 * lost for tp in question.tps}


def wants(question: PoolQuestion, surge_max: float = SURGES[-1][0]) -> list[Want]:
    d, name = question.demand, question.pool.name
    return [Want(name, t.name, d[t.name].rate, t.target, t.weight, surge_max) for t in question.slo_tiers]


def problem(
    questions: list[PoolQuestion], snapshot: Snapshot, capacity: Capacity, barred: frozenset[str]
) -> tuple[Problem, list[list[NodeView]], Counts]:
    """The joint question of several pools, the nodes of each class, and what runs as counts."""
    all_kinds = tuple(k for q in questions for k in kinds(q, snapshot, capacity))
    found, members = classes(questions, barred)
    running: Running = {key: tiers for q in questions for key, tiers in q.running.items()}
    counts = counts_of(all_kinds, members, running)
    runs: dict[tuple[int, str, int], int] = {}
    for (c, k), n in counts.items():
        key = c, all_kinds[k].pool, all_kinds[k].tp_size
        runs[key] = runs.get(key, 0) + n
    budgets = {q.pool.name: q.budget for q in questions}
    return Problem(tuple(w for q in questions for w in wants(q)), all_kinds, tuple(found), budgets, runs), members, counts
