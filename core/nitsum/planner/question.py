"""From a Snapshot to what is asked of one pool: demand with headroom, the TPs, nodes and GPUs that it may use, what of it may stay."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import NormalDist

from nitsum.attainment import MARGIN
from nitsum.demand import TierDemand
from nitsum.layout import Group, Role
from nitsum.perf.memory import worth_residing
from nitsum.planner.place import Key, Running
from nitsum.planner.problem import SURGES, Want
from nitsum.planner.split import Split, read
from nitsum.planner.types import NodeView, Snapshot
from nitsum.pool import Pool, Tier

PRIOR_RATE = 0.05
"""requests/s assumed of a tier nobody has asked for yet: enough to tell a layout that could serve it from one that could not."""


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


def wants(question: PoolQuestion, surge_max: float = SURGES[-1][0]) -> list[Want]:
    """What surely comes is what groups can serve at all, who are rated at MARGIN of it."""
    d, name = question.demand, question.pool.name
    sure = {t.name: MARGIN * max(question.expected[t.name], PRIOR_RATE) for t in question.slo_tiers}
    return [Want(name, t.name, d[t.name].rate, t.target, t.weight, surge_max, sure[t.name]) for t in question.slo_tiers]
