"""Planner, version 0: one pass over the pools, each by full enumeration of a small family of shapes.

A shape splits the pool's tiers, ordered by strictness, into one or two parts and gives each part k groups of one TP; what is left over is
filled with the largest smaller TP that fits. Every shape is packed onto real GPUs (what runs already stays where it is, if it can), valued
by `objective`, and compared with what runs now. A change must win by `gain_min` after paying for its pause over the expected dwell.

Invariants, asserted before a plan leaves: no GPU twice, never above a budget (GPUs that lost nodes may hold count), engines of a layout
are resident.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from nitsum.demand import TierDemand
from nitsum.layout import Capacity, FlipMode, Group, Layout, TierShare
from nitsum.objective import Targets, mixture, safe_rate, strictest
from nitsum.planner.types import NodePlan, NodeView, Plan, PoolPlan, Snapshot, TierOutlook, Verdict
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.residency import Residency, ResidentEngine
from nitsum.topology import Gpu

PRIOR_RATE = 0.05
"""requests/s assumed of a tier nobody has asked for yet: enough to tell a layout that could serve it from one that could not."""
QUEUE_PER_RUNNING = 4
"""Waiting requests that a group may hold for each running one."""


@dataclass(frozen=True)
class _Placed:
    """One group on real GPUs: where, how wide, for which tiers."""

    agent_id: str
    engine: ResidentEngine
    tiers: tuple[str, ...]


@dataclass(frozen=True)
class _Valued:
    placed: tuple[_Placed, ...]
    score: float
    goodput: float
    outlook: tuple[TierOutlook, ...]
    label: str


@dataclass
class _PoolView:
    """Everything of one pool that does not change between shapes."""

    pool: Pool
    snapshot: Snapshot
    owned: dict[str, tuple[Gpu, ...]]
    demand: dict[str, TierDemand]
    tps: tuple[int, ...]
    capacity: dict[tuple[int, tuple[str, ...], int], tuple[float, str, int]] = field(default_factory=dict)

    @property
    def slo_tiers(self) -> tuple[Tier, ...]:
        """Strictest TPOT first; tiers without an SLO ride along and have no say."""
        key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
        return tuple(sorted((t for t in self.pool.tiers if not t.background), key=key))

    def engine(self, agent_id: str, gpus: tuple[Gpu, ...]) -> ResidentEngine:
        name = f"{self.pool.name.replace('/', '.')}-tp{len(gpus)}-{gpus[0].index}"
        return ResidentEngine(name, self.pool.model, len(gpus), tuple(g.uuid for g in gpus))

    def blocks(self, agent_id: str, size: int) -> Iterator[tuple[Gpu, ...]]:
        gpus = self.owned[agent_id]
        for i in range(0, len(gpus) - size + 1, size):
            if len({g.island for g in gpus[i : i + size]}) == 1:
                yield gpus[i : i + size]

    def safe(self, tp_size: int, tiers: tuple[str, ...], level: int) -> tuple[float, str, int]:
        """safe_rate of one group that serves `tiers`, holding the targets of tiers[level:]. Cached."""
        if (key := (tp_size, tiers, level)) not in self.capacity:
            members = tuple(t for t in self.slo_tiers if t.name in tiers)
            load = mixture(tuple(self.demand[t.name] for t in members))
            targets = strictest(members[level:]) if members else Targets(None, None)
            self.capacity[key] = safe_rate(self.snapshot.step_times[self.pool.name], tp_size, load, targets, self.tps)
        return self.capacity[key]


def _headroom(demand: TierDemand, quantile: float) -> TierDemand:
    z = max(NormalDist().inv_cdf(quantile), 0.0)
    return replace(demand, rate=max(demand.rate + z * min(demand.rate_stddev, demand.rate), PRIOR_RATE))


def _owned(pool: Pool, snapshot: Snapshot, taken: set[str]) -> dict[str, tuple[Gpu, ...]]:
    """The pool's GPUs by agent: those that it runs on stay its own; the rest of its budget is taken node by node."""
    left = pool.budget_gpus - len(set(snapshot.holds.get(pool.name, ())))
    nodes = [
        n for n in sorted(snapshot.nodes, key=lambda n: n.node.agent_id) if n.schedulable and set(pool.node_selector) <= set(n.node.labels)
    ]
    mine = {n.node.agent_id: {u for g in n.layout.groups if g.pool == pool.name for u in g.gpu_uuids} for n in nodes}
    foreign = {u for n in nodes for g in n.layout.groups if g.pool != pool.name for u in g.gpu_uuids} | taken
    owned: dict[str, list[Gpu]] = {}
    for keep in (True, False):
        for n in nodes:
            for gpu in sorted(n.node.gpus):
                if left > 0 and (gpu.uuid in mine[n.node.agent_id]) is keep and gpu.uuid not in foreign:
                    owned.setdefault(n.node.agent_id, []).append(gpu)
                    left -= 1
    return {a: tuple(sorted(g)) for a, g in sorted(owned.items())}


def _running(view: _PoolView) -> tuple[_Placed, ...]:
    placed = []
    for n in view.snapshot.nodes:
        for g in n.layout.groups:
            if g.pool == view.pool.name:
                engine = ResidentEngine(g.engine_id, g.model, g.tp_size, g.gpu_uuids)
                placed.append(_Placed(n.node.agent_id, engine, tuple(sorted(s.tier for s in g.shares))))
    return tuple(sorted(placed, key=lambda p: (p.agent_id, p.engine.engine_id)))


def _pack(view: _PoolView, parts: tuple[tuple[int, int, tuple[str, ...]], ...], running: tuple[_Placed, ...]) -> tuple[_Placed, ...] | None:
    """Parts are (tp_size, groups wanted, tiers). Widest first; what runs already is kept; then the blocks with the least KV."""
    same = {(p.agent_id, p.engine.gpu_uuids) for p in running}
    tokens = {u: n.resident_tokens.get(g.group_id, 0) for n in view.snapshot.nodes for g in n.layout.groups for u in g.gpu_uuids}
    used: set[str] = set()
    placed: list[_Placed] = []
    for tp_size, wanted, tiers in sorted(parts, key=lambda p: (-p[0], p[2])):
        free = [(a, b) for a in view.owned for b in view.blocks(a, tp_size) if not used & {g.uuid for g in b}]
        free.sort(
            key=lambda ab: ((ab[0], tuple(g.uuid for g in ab[1])) not in same, sum(tokens.get(g.uuid, 0) for g in ab[1]), ab[0], ab[1])
        )
        if len(free) < wanted:
            return None
        for agent_id, block in free[:wanted]:
            used |= {g.uuid for g in block}
            placed.append(_Placed(agent_id, view.engine(agent_id, block), tiers))
    loosest = parts[-1][2]
    for tp_size in sorted((t for t in view.tps if t < max(p[0] for p in parts)), reverse=True):
        for agent_id in view.owned:
            for block in view.blocks(agent_id, tp_size):
                if not used & {g.uuid for g in block}:
                    used |= {g.uuid for g in block}
                    placed.append(_Placed(agent_id, view.engine(agent_id, block), loosest))
    return tuple(sorted(placed, key=lambda p: (p.agent_id, p.engine.engine_id)))


def _value(view: _PoolView, placed: tuple[_Placed, ...], label: str) -> _Valued:
    """Expected goodput by tier. Every tier takes its safe rate from the groups that serve it, heavier weights first."""
    tiers = view.slo_tiers
    served = dict.fromkeys((t.name for t in tiers), 0.0)
    offered = {t.name: view.demand[t.name].rate for t in tiers}
    safe = dict.fromkeys(served, 0.0)
    binding = dict.fromkeys(served, "no group serves it")
    kinds: dict[tuple[int, tuple[str, ...]], int] = {}
    for p in placed:
        kinds[p.engine.tp_size, p.tiers] = kinds.get((p.engine.tp_size, p.tiers), 0) + 1
    for (tp_size, names), count in sorted(kinds.items()):
        members = [t for t in tiers if t.name in names]
        best: tuple[float, int] = (-1.0, 0)
        for level in range(len(members)):  # give up the strictest targets one by one where they cannot be held
            rate, _, _ = view.safe(tp_size, names, level)
            held = members[level:]
            worth = min(rate * count, sum(offered[t.name] for t in members)) * sum(t.weight for t in held) / max(len(members), 1)
            best = max(best, (worth, -level))
        level = -best[1]
        rate, limit, _ = view.safe(tp_size, names, level) if members else (0.0, "", 0)
        left = rate * count
        for t in sorted(members[level:], key=lambda t: (-t.weight, t.name)):
            got = min(max(offered[t.name] - served[t.name], 0.0), left)
            served[t.name] += got
            left -= got
            safe[t.name] += got
            binding[t.name] = limit
        for t in members[level:]:
            safe[t.name] += left / max(len(members[level:]), 1)
        for t in members[:level]:
            binding[t.name] = view.safe(tp_size, (t.name,), 0)[1] + f" at TP {tp_size}"
    score = 0.0
    for t in tiers:
        attained = served[t.name] / offered[t.name]
        # First every tier's target, then weight x goodput; the last term prefers slack between equals.
        score += t.weight * (
            10 * offered[t.name] * min(attained, t.target) + served[t.name] + 0.01 * min(safe[t.name], 2 * offered[t.name])
        )
    outlook = tuple(
        TierOutlook(t.name, offered[t.name], safe[t.name], served[t.name] >= t.target * offered[t.name], binding[t.name]) for t in tiers
    )
    return _Valued(placed, score, sum(served.values()), outlook, label)


def _shapes(view: _PoolView) -> Iterator[tuple[str, tuple[tuple[int, int, tuple[str, ...]], ...]]]:
    names = tuple(t.name for t in view.slo_tiers) or tuple(t.name for t in view.pool.tiers)
    background = tuple(t.name for t in view.pool.tiers if t.background)
    total = {tp: sum(1 for a in view.owned for _ in view.blocks(a, tp)) for tp in view.tps}
    whole = tuple(sorted({*names, *background}))
    for tp in view.tps:
        if total[tp]:
            yield f"{total[tp]} x TP{tp} for all tiers", ((tp, total[tp], whole),)
    gpus = sum(map(len, view.owned.values()))
    for cut in range(1, len(names)):
        strict, loose = tuple(sorted(names[:cut])), tuple(sorted({*names[cut:], *background}))
        for a in view.tps:
            for k in range(1, total[a] + 1):
                for b in view.tps:
                    if (rest := (gpus - a * k) // b) > 0:
                        yield (
                            f"{k} x TP{a} for {'+'.join(strict)}, {rest} x TP{b} for {'+'.join(loose)}",
                            ((a, k, strict), (b, rest, loose)),
                        )


def _describe(placed: Iterable[_Placed]) -> str:
    counts: dict[int, int] = {}
    for p in placed:
        counts[p.engine.tp_size] = counts.get(p.engine.tp_size, 0) + 1
    return " + ".join(f"{n}xTP{tp}" for tp, n in sorted(counts.items())) or "nothing"


def _pause_s(view: _PoolView, old: tuple[_Placed, ...], new: tuple[_Placed, ...]) -> tuple[float, float]:
    """(seconds that the changed GPUs stand still, their part of the pool)."""
    kept = {(p.agent_id, p.engine.engine_id) for p in new}
    ended = [p for p in old if (p.agent_id, p.engine.engine_id) not in kept]
    if not ended:
        return 0.0, 0.0
    tokens = {(n.node.agent_id, g): t for n in view.snapshot.nodes for g, t in n.resident_tokens.items()}
    to_tp = max((p.engine.tp_size for p in new), default=1)
    cost = view.snapshot.flip_costs[view.pool.name]
    pause = max(cost.pause_ms(tokens.get((p.agent_id, p.engine.engine_id), 0), FlipMode.ABORT, p.engine.tp_size, to_tp) for p in ended)
    return pause / 1e3, sum(p.engine.tp_size for p in ended) / max(sum(p.engine.tp_size for p in old), 1)


def _decide(view: _PoolView, now: float) -> tuple[tuple[_Placed, ...], PoolPlan]:
    pool, settings = view.pool, view.snapshot.settings
    running = _running(view)
    if not view.owned or not view.tps:
        why = "no GPU within budget and selector" if not view.owned else f"no legal TP among {list(pool.allowed_tp) or 'any'}"
        return running, PoolPlan(pool.name, 0, 0.0, (), (why,), verdict=Verdict.BLOCKED)
    options: dict[tuple[_Placed, ...], _Valued] = {}
    for label, parts in _shapes(view):
        if (placed := _pack(view, parts, running)) is not None and placed not in options:
            options[placed] = _value(view, placed, label)
    ranked = sorted(options.values(), key=lambda v: (-v.score, len(v.placed), v.label))
    best = ranked[0]
    gpus = sum(map(len, view.owned.values()))
    reasons = [f"profile {getattr(view.snapshot.step_times[pool.name], 'name', '?')} ({view.snapshot.step_times[pool.name].origin})"]
    current = _value(view, running, "as it runs")
    whole = bool(running) and {u for p in running for u in p.engine.gpu_uuids} == {g.uuid for gs in view.owned.values() for g in gs}

    def keep(why: str, verdict: Verdict = Verdict.KEEP) -> tuple[tuple[_Placed, ...], PoolPlan]:
        return running, PoolPlan(pool.name, gpus, current.goodput, current.outlook, (*reasons, why), _rejected(ranked, current), verdict)

    if running and whole:
        fresh = [d for d in view.snapshot.demand if d.pool == pool.name]
        nodes = {n.node.agent_id: n for n in view.snapshot.nodes if n.node.agent_id in view.owned}
        if not fresh or all(now - d.observed_at > settings.stale_after_s for d in fresh):
            return keep("no fresh demand report: the last safe layout stays")
        if any(n.flipping for n in nodes.values()) or any(d.frozen for d in fresh):
            return keep("a flip is running")
        if any(n.last_flip_at is not None and now - n.last_flip_at < settings.cooldown_s for n in nodes.values()):
            return keep(f"cooling down for {settings.cooldown_s:g} s after the last flip")
        pause, part = _pause_s(view, running, best.placed)
        net = best.score * (1 - pause * part / settings.dwell_s)
        if best.placed == running or net < current.score * (1 + settings.gain_min):
            gain = best.score / current.score - 1 if current.score > 0 else 0.0
            return keep(f"{_describe(running)} stays: the best other shape gains {max(gain, 0):.0%}, {settings.gain_min:.0%} is asked")
        if pool.mode is not AdaptationMode.ACTIVE:
            return keep(f"{pool.mode}: would change {_describe(running)} to {best.label}")
        reasons.append(
            f"{_describe(running)} -> {best.label}: expected goodput {current.goodput:.2f} -> {best.goodput:.2f} requests/s "
            f"for a pause of {pause * 1e3:.0f} ms on {part:.0%} of the GPUs, expected to last {settings.dwell_s:g} s"
        )
    elif running:
        reasons.append(f"its GPUs changed: {_describe(running)} -> {best.label}")
    else:
        reasons.append(f"first layout: {best.label}")
    return best.placed, PoolPlan(
        pool.name, gpus, best.goodput, best.outlook, tuple(reasons), _rejected(ranked[1:], current), Verdict.CHANGE
    )


def _rejected(ranked: list[_Valued], current: _Valued) -> tuple[str, ...]:
    others = [v for v in ranked if v.placed != current.placed][:3]
    return tuple(f"{v.label}: expected goodput {v.goodput:.2f} requests/s, score {v.score:.2f}" for v in others)


def _group(view: _PoolView, p: _Placed) -> Group:
    members = tuple(t for t in view.slo_tiers if t.name in p.tiers)
    rates = {t.name: view.demand[t.name].rate for t in members}
    levels = [view.safe(p.engine.tp_size, p.tiers, level) for level in range(len(members))]
    rate, _, batch = next((c for c in levels if c[0] > 0), (0.0, "", 0))
    kv_tokens = view.snapshot.step_times[view.pool.name].kv_capacity_tokens(p.engine.tp_size, view.tps)
    running = max(batch, 1)
    total = sum(rates.values())
    shares = tuple(TierShare(t, round(rates[t] / total, 3) if t in rates else 0.0) for t in p.tiers)
    prompt = mixture(tuple(view.demand[t.name] for t in members)).prompt if members else 0.0
    capacity = Capacity(running, kv_tokens, round(rate * prompt, 1), running * QUEUE_PER_RUNNING + 8)
    return Group(
        p.engine.engine_id,
        p.engine.engine_id,
        view.pool.name,
        view.pool.model,
        p.engine.tp_size,
        p.engine.gpu_uuids,
        shares=shares,
        capacity=capacity,
    )


def plan(snapshot: Snapshot, now: float) -> Plan:
    """Implements `Planner`. Pools are served in the order of their names; input order does not matter."""
    taken: set[str] = set()
    groups: dict[str, list[Group]] = {n.node.agent_id: [] for n in snapshot.nodes}
    engines: dict[str, list[ResidentEngine]] = {n.node.agent_id: [] for n in snapshot.nodes}
    pools: list[PoolPlan] = []
    changing: set[str] = set()
    for pool in sorted(snapshot.pools, key=lambda p: p.name):
        owned = _owned(pool, snapshot, taken)
        legal = [set(n.node.legal_tp.get(pool.model, ())) for n in snapshot.nodes if n.node.agent_id in owned]
        widest = max(map(len, owned.values()), default=0)
        known = set.intersection(*legal) if legal else set()
        times = snapshot.step_times[pool.name]
        tps = tuple(t for t in sorted(known) if t <= widest and t in times.tp_sizes and (not pool.allowed_tp or t in pool.allowed_tp))
        seen = {d.tier: d for d in snapshot.demand if d.pool == pool.name}
        quantile = snapshot.settings.headroom_quantile
        demand = {t.name: _headroom(seen.get(t.name, TierDemand(pool.name, t.name, 0.0)), quantile) for t in pool.tiers}
        view = _PoolView(pool, snapshot, owned, demand, tps)
        placed, pool_plan = _decide(view, now)
        pools.append(pool_plan)
        before = {n.node.agent_id: {g.engine_id for g in n.layout.groups if g.pool == pool.name} for n in snapshot.nodes}
        for p in placed:
            groups[p.agent_id].append(_group(view, p) if tps and set(p.tiers) & set(demand) else _as_runs(snapshot, p))
            taken |= set(p.engine.gpu_uuids)
        for agent_id in owned:
            engines[agent_id] += [view.engine(agent_id, b) for tp in tps for b in view.blocks(agent_id, tp)]
            if before[agent_id] and before[agent_id] != {p.engine.engine_id for p in placed if p.agent_id == agent_id}:
                changing.add(agent_id)
        assert sum(p.engine.tp_size for p in placed) <= pool.budget_gpus, f"{pool.name}: above its budget"
    late = sorted(changing)[snapshot.settings.flips_at_once_max :]
    nodes = []
    for n in sorted(snapshot.nodes, key=lambda n: n.node.agent_id):
        agent_id = n.node.agent_id
        if agent_id in late:
            nodes.append(NodePlan(agent_id, n.residency, n.layout))
            continue
        layout = Layout(tuple(sorted(groups[agent_id], key=lambda g: g.group_id)))
        residency = Residency(tuple(sorted(engines[agent_id], key=lambda e: e.engine_id)))
        missing = [g for g in layout.groups if residency.engine(g.engine_id) is None]
        residency = Residency((*residency.engines, *(ResidentEngine(g.engine_id, g.model, g.tp_size, g.gpu_uuids) for g in missing)))
        nodes.append(NodePlan(agent_id, residency, layout))
    digest = hashlib.sha256(repr([(n.agent_id, n.residency, n.layout) for n in nodes]).encode()).hexdigest()
    return Plan(digest[:12], tuple(nodes), tuple(pools))


def _as_runs(snapshot: Snapshot, p: _Placed) -> Group:
    """A running group that is only carried on: nothing about it can be computed now."""
    view: NodeView = next(n for n in snapshot.nodes if n.node.agent_id == p.agent_id)
    return next(g for g in view.layout.groups if g.engine_id == p.engine.engine_id)
