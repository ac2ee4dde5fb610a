"""Planner, version 0: one pass over the pools, each by enumeration of a small family of shapes.

A shape splits the pool's tiers, ordered by strictness, into one or two parts and gives each part k groups of one TP; what is left over is
filled with the largest smaller TP that fits. Shapes are valued by `objective`; the best are packed onto real GPUs (what runs already stays
where it is, if it can) and compared with what runs now. A change must win by `gain_min` after paying for its pause over the expected dwell.
In a small pool every shape is packed; in a large one k is searched coarse to fine on counts, so that a plan takes a fraction of a second.

What runs is first made to fit what is asked: groups that the pool no longer has GPUs, budget, TP or model for end, free GPUs are filled.
That is repair, in every mode; anything more is a change, and must win.

Invariants, asserted before a plan leaves: no GPU twice, never above a budget (GPUs that lost nodes may hold count), engines of a layout
are resident.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
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
SIZES_MAX = 8
"""Values of k tried in each round of the search."""
PACKED_MAX = 64
"""Shapes packed onto real GPUs: all of a small pool's, the best of a large one's."""
PACKED_LARGE = 8

Part = tuple[int, int, tuple[str, ...]]
"""tp_size, groups wanted, tiers."""


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
    order: dict[int, list[tuple[str, tuple[Gpu, ...]]]] = field(default_factory=dict)

    @property
    def slo_tiers(self) -> tuple[Tier, ...]:
        """Strictest TPOT first; tiers without an SLO ride along and have no say."""
        key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
        return tuple(sorted((t for t in self.pool.tiers if not t.background), key=key))

    @property
    def mark(self) -> str:
        """Ends every engine id: an engine of another checkpoint is another engine, also under the same model name."""
        return f"-{self.pool.checkpoint}" if self.pool.checkpoint else ""

    def engine(self, agent_id: str, gpus: tuple[Gpu, ...]) -> ResidentEngine:
        name = f"{self.pool.name.replace('/', '.')[:80]}-tp{len(gpus)}-{gpus[0].index}{self.mark}"
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


def _fitting(pool: Pool, snapshot: Snapshot) -> list[NodeView]:
    nodes = sorted(snapshot.nodes, key=lambda n: n.node.agent_id)
    return [n for n in nodes if n.schedulable and set(pool.node_selector) <= set(n.node.labels)]


def _why_blocked(view: _PoolView, taken: Mapping[str, str]) -> str:
    """Why a pool that has no GPU, or none in a block wide enough, gets nothing. `taken`: pools by GPU, of this plan."""
    pool, nodes = view.pool, _fitting(view.pool, view.snapshot)
    gpus = {g.uuid for n in nodes for g in n.node.gpus}
    holders = {g.pool for n in nodes for g in n.layout.groups if gpus & set(g.gpu_uuids)} | {p for u, p in taken.items() if u in gpus}
    others = ", ".join(sorted(holders - {pool.name}))
    widest = max(map(len, view.owned.values()), default=0)
    if not view.owned:
        held = {u for n in nodes for g in n.layout.groups if g.pool != pool.name for u in g.gpu_uuids} | set(taken)
        return f"all GPUs that match are in use by pools {others}" if gpus and gpus <= held else "no GPU within budget and selector"
    legal = set.intersection(*(set(n.node.legal_tp.get(pool.model, ())) for n in nodes if n.node.agent_id in view.owned))
    profiled = view.snapshot.step_times[pool.name].tp_sizes
    fits = [t for t in sorted(legal) if t in profiled and (not pool.allowed_tp or t in pool.allowed_tp)]
    if fits and others:
        return f"TP {fits[0]} needs {fits[0]} GPUs of one node and {widest} can be had; others are in use by pools {others}"
    return f"no legal TP among {list(pool.allowed_tp) or 'any'}"


def _owned(pool: Pool, snapshot: Snapshot, taken: Mapping[str, str]) -> dict[str, tuple[Gpu, ...]]:
    """The pool's GPUs by agent: those that it runs on stay its own; the rest of its budget is taken node by node.

    What it still has on nodes that it may not use any more counts until it is gone.
    """
    nodes = _fitting(pool, snapshot)
    inside = {n.node.agent_id for n in nodes}
    leaving = {
        u for n in snapshot.nodes if n.node.agent_id not in inside for g in n.layout.groups if g.pool == pool.name for u in g.gpu_uuids
    }
    left = pool.budget_gpus - len({*snapshot.holds.get(pool.name, ()), *leaving})
    mine = {n.node.agent_id: {u for g in n.layout.groups if g.pool == pool.name for u in g.gpu_uuids} for n in nodes}
    foreign = {u for n in nodes for g in n.layout.groups if g.pool != pool.name for u in g.gpu_uuids} | set(taken)
    owned: dict[str, list[Gpu]] = {}
    for keep in (True, False):
        for n in nodes:
            for gpu in sorted(n.node.gpus):
                if left > 0 and (gpu.uuid in mine[n.node.agent_id]) is keep and gpu.uuid not in foreign:
                    owned.setdefault(n.node.agent_id, []).append(gpu)
                    left -= 1
    return {a: tuple(sorted(g)) for a, g in sorted(owned.items())}


def _running(view: _PoolView) -> tuple[_Placed, ...]:
    """Groups of the pool's model, for the tiers that it has now. A tier that no group serves yet is served by all."""
    known = {t.name for t in view.pool.tiers}
    groups = [
        (n.node.agent_id, g)
        for n in view.snapshot.nodes
        if n.schedulable
        for g in n.layout.groups
        if g.pool == view.pool.name and g.model == view.pool.model and g.engine_id.endswith(view.mark)
    ]
    new = known - {s.tier for _, g in groups for s in g.shares}
    placed = [
        _Placed(
            agent_id,
            ResidentEngine(g.engine_id, g.model, g.tp_size, g.gpu_uuids),
            tuple(sorted(({s.tier for s in g.shares} & known or known) | new)),
        )
        for agent_id, g in groups
    ]
    return tuple(sorted(placed, key=lambda p: (p.agent_id, p.engine.engine_id)))


def _repaired(view: _PoolView, running: tuple[_Placed, ...]) -> tuple[_Placed, ...]:
    """What runs, less what does not fit any more, and free GPUs filled. Empty where nothing fits."""
    owned = {a: {g.uuid for g in gpus} for a, gpus in view.owned.items()}
    fits = [p for p in running if p.engine.tp_size in view.tps and set(p.engine.gpu_uuids) <= owned.get(p.agent_id, set())]
    if not fits:
        return ()
    used = {u for p in fits for u in p.engine.gpu_uuids}
    everyone = tuple(sorted(t.name for t in view.pool.tiers))
    fits += _filled(view, used, everyone, max(p.engine.tp_size for p in fits))
    return tuple(sorted(fits, key=lambda p: (p.agent_id, p.engine.engine_id)))


def _filled(view: _PoolView, used: set[str], tiers: tuple[str, ...], widest: int) -> list[_Placed]:
    """Groups on what is free, widest first; their GPUs are added to `used`."""
    placed = []
    for tp_size in sorted((t for t in view.tps if t <= widest), reverse=True):
        for agent_id in view.owned:
            for block in view.blocks(agent_id, tp_size):
                if not any(g.uuid in used for g in block):
                    used |= {g.uuid for g in block}
                    placed.append(_Placed(agent_id, view.engine(agent_id, block), tiers))
    return placed


def _ordered(view: _PoolView, tp_size: int, running: tuple[_Placed, ...]) -> list[tuple[str, tuple[Gpu, ...]]]:
    """Blocks in the order of preference: what runs already, then those with the least KV. Cached."""
    if tp_size not in view.order:
        same = {(p.agent_id, p.engine.gpu_uuids) for p in running}
        tokens = {u: n.resident_tokens.get(g.group_id, 0) for n in view.snapshot.nodes for g in n.layout.groups for u in g.gpu_uuids}
        view.order[tp_size] = sorted(
            ((a, b) for a in view.owned for b in view.blocks(a, tp_size)),
            key=lambda ab: ((ab[0], tuple(g.uuid for g in ab[1])) not in same, sum(tokens.get(g.uuid, 0) for g in ab[1]), ab[0], ab[1]),
        )
    return view.order[tp_size]


def _pack(view: _PoolView, parts: tuple[Part, ...], running: tuple[_Placed, ...]) -> tuple[_Placed, ...] | None:
    """Widest first; what runs already is kept; then the blocks with the least KV."""
    used: set[str] = set()
    placed: list[_Placed] = []
    for tp_size, wanted, tiers in sorted(parts, key=lambda p: (-p[0], p[2])):
        left = wanted
        for agent_id, block in _ordered(view, tp_size, running):
            if left == 0:
                break
            if not any(g.uuid in used for g in block):
                used |= {g.uuid for g in block}
                placed.append(_Placed(agent_id, view.engine(agent_id, block), tiers))
                left -= 1
        if left:
            return None
    placed += _filled(view, used, parts[-1][2], max(p[0] for p in parts) - 1)
    return tuple(sorted(placed, key=lambda p: (p.agent_id, p.engine.engine_id)))


def _value(view: _PoolView, placed: tuple[_Placed, ...], label: str) -> _Valued:
    kinds: dict[tuple[int, tuple[str, ...]], int] = {}
    for p in placed:
        kinds[p.engine.tp_size, p.tiers] = kinds.get((p.engine.tp_size, p.tiers), 0) + 1
    return _Valued(placed, *_worth(view, kinds), label)


def _worth(view: _PoolView, kinds: dict[tuple[int, tuple[str, ...]], int]) -> tuple[float, float, tuple[TierOutlook, ...]]:
    """Score, expected goodput, outlook by tier. Every tier takes its safe rate from the groups that serve it, heavier weights first.

    `kinds`: number of groups by TP and tiers.
    """
    tiers = view.slo_tiers
    served = dict.fromkeys((t.name for t in tiers), 0.0)
    offered = {t.name: view.demand[t.name].rate for t in tiers}
    safe = dict.fromkeys(served, 0.0)
    binding = dict.fromkeys(served, "no group serves it")
    for (tp_size, names), count in sorted(kinds.items()):
        members = [t for t in tiers if t.name in names]
        asked = sum(offered[t.name] for t in members)
        best: tuple[float, int] = (-1.0, 0)
        for level in range(len(members)):  # give up the strictest targets one by one where they cannot be held
            part = sum(t.weight for t in members[level:]) / len(members)
            if best[0] >= asked * part:
                break  # fewer targets cannot be worth more
            rate, _, _ = view.safe(tp_size, names, level)
            worth = min(rate * count, asked) * part
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
    return score, sum(served.values()), outlook


@dataclass(frozen=True)
class _Shape:
    """`step`: how far the next k that was tried is from this one."""

    label: str
    parts: tuple[Part, ...]
    step: int = 1


def _splits(view: _PoolView) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    names = tuple(t.name for t in view.slo_tiers) or tuple(t.name for t in view.pool.tiers)
    background = tuple(t.name for t in view.pool.tiers if t.background)
    return tuple((tuple(sorted(names[:cut])), tuple(sorted({*names[cut:], *background}))) for cut in range(1, len(names)))


def _two(gpus: int, a: int, k: int, strict: tuple[str, ...], b: int, loose: tuple[str, ...], step: int) -> _Shape | None:
    rest = (gpus - a * k) // b
    label = f"{k} x TP{a} for {'+'.join(strict)}, {rest} x TP{b} for {'+'.join(loose)}"
    return _Shape(label, ((a, k, strict), (b, rest, loose)), step) if k > 0 and rest > 0 else None


def _shapes(view: _PoolView, total: dict[int, int]) -> Iterator[_Shape]:
    """Every TP for all tiers, and every split with k in at most SIZES_MAX steps."""
    whole = tuple(sorted(t.name for t in view.pool.tiers))
    for tp in view.tps:
        if total[tp]:
            yield _Shape(f"{total[tp]} x TP{tp} for all tiers", ((tp, total[tp], whole),))
    gpus = sum(map(len, view.owned.values()))
    for strict, loose in _splits(view):
        for a in view.tps:
            step = -(-total[a] // SIZES_MAX)
            for k in range(step, total[a] + 1, step) if step else ():
                for b in view.tps:
                    if (shape := _two(gpus, a, k, strict, b, loose, step)) is not None:
                        yield shape


def _finer(shape: _Shape, gpus: int) -> Iterator[_Shape]:
    """The values of k between this one and its neighbours."""
    (a, k, strict), (b, _, loose) = shape.parts
    step = -(-shape.step // SIZES_MAX)
    for other in range(k - shape.step + 1, k + shape.step, step):
        if other != k and (found := _two(gpus, a, other, strict, b, loose, step)) is not None:
            yield found
    yield _Shape(shape.label, shape.parts, step)


def _promising(view: _PoolView) -> list[_Shape]:
    """All shapes of a small pool; of a large one the best by their counts."""
    total = {tp: sum(1 for a in view.owned for _ in view.blocks(a, tp)) for tp in view.tps}
    gpus = sum(map(len, view.owned.values()))
    shapes = list(_shapes(view, total))
    if len(shapes) <= PACKED_MAX and all(s.step == 1 for s in shapes):
        return shapes
    scores: dict[tuple[Part, ...], float] = {}

    def score(shape: _Shape) -> float:
        if shape.parts not in scores:
            kinds, left, widest = dict[tuple[int, tuple[str, ...]], int](), gpus, max(p[0] for p in shape.parts)
            for tp, n, tiers in (*shape.parts, *((tp, 0, shape.parts[-1][2]) for tp in reversed(view.tps) if tp < widest)):
                n = n or left // tp
                kinds[tp, tiers] = kinds.get((tp, tiers), 0) + n
                left -= n * tp
            scores[shape.parts] = _worth(view, {k: n for k, n in kinds.items() if n})[0]
        return scores[shape.parts]

    while True:
        shapes.sort(key=lambda s: (-score(s), s.label))
        shapes = list({s.parts: s for s in reversed(shapes)}.values())[::-1]
        rough = [s for s in shapes[:PACKED_LARGE] if s.step > 1]
        if not rough:
            return shapes[:PACKED_LARGE]
        shapes = [s for s in shapes[:PACKED_LARGE] if s.step == 1] + [f for s in rough for f in _finer(s, gpus)]


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


def _decide(view: _PoolView, now: float, taken: Mapping[str, str]) -> tuple[tuple[_Placed, ...], PoolPlan]:
    pool, settings = view.pool, view.snapshot.settings
    running = _running(view)
    if not view.owned or not view.tps:
        why = _why_blocked(view, taken)
        fitting = {n.node.agent_id for n in _fitting(pool, view.snapshot)}
        # Where no node fits at all, what runs stays; else it makes room in the budget for the nodes that do.
        return tuple(p for p in running if p.agent_id in fitting or not fitting), PoolPlan(
            pool.name, 0, 0.0, (), (why,), verdict=Verdict.BLOCKED
        )
    options: dict[tuple[_Placed, ...], _Valued] = {}
    for shape in _promising(view):
        if (placed := _pack(view, shape.parts, running)) is not None and placed not in options:
            options[placed] = _value(view, placed, shape.label)
    repaired = _repaired(view, running)
    current = _value(view, repaired, "as it runs")
    ranked = sorted(options.values(), key=lambda v: (-v.score, len(v.placed), v.label)) or [current]
    best = ranked[0]
    gpus = sum(map(len, view.owned.values()))
    reasons = [f"profile {getattr(view.snapshot.step_times[pool.name], 'name', '?')} ({view.snapshot.step_times[pool.name].origin})"]

    def keep(why: str, would: bool = False) -> tuple[tuple[_Placed, ...], PoolPlan]:
        verdict, rejected = Verdict.KEEP if repaired == running else Verdict.CHANGE, _rejected(ranked, current)
        return repaired, PoolPlan(pool.name, gpus, current.goodput, current.outlook, (*reasons, why), rejected, verdict, would)

    if repaired:
        if repaired != running:
            reasons.append(f"what it may use changed: {_describe(running)} -> {_describe(repaired)}")
        fresh = [d for d in view.snapshot.demand if d.pool == pool.name]
        nodes = {n.node.agent_id: n for n in view.snapshot.nodes if n.node.agent_id in view.owned}
        if not fresh or all(now - d.observed_at > settings.stale_after_s for d in fresh):
            return keep("no fresh demand report: the last safe layout stays")
        if any(n.flipping for n in nodes.values()) or any(d.frozen for d in fresh):
            return keep("a flip is running")
        if any(n.last_flip_at is not None and now - n.last_flip_at < settings.cooldown_s for n in nodes.values()):
            return keep(f"cooling down for {settings.cooldown_s:g} s after the last flip")
        pause, part = _pause_s(view, repaired, best.placed)
        net = best.score * (1 - pause * part / settings.dwell_s)
        if best.placed == repaired or net < current.score * (1 + settings.gain_min):
            gain = best.score / current.score - 1 if current.score > 0 else 0.0
            return keep(f"{_describe(repaired)} stays: the best other shape gains {max(gain, 0):.0%}, {settings.gain_min:.0%} is asked")
        if pool.mode is not AdaptationMode.ACTIVE:
            return keep(f"{pool.mode}: would change {_describe(repaired)} to {best.label}", would=True)
        reasons.append(
            f"{_describe(repaired)} -> {best.label}: expected goodput {current.goodput:.2f} -> {best.goodput:.2f} requests/s "
            f"for a pause of {pause * 1e3:.0f} ms on {part:.0%} of the GPUs, expected to last {settings.dwell_s:g} s"
            f"{_in_spite(current, best)}"
        )
    elif any(g.pool == pool.name for n in view.snapshot.nodes for g in n.layout.groups):
        reasons.append(f"nothing that runs fits the spec or the GPUs any more: {best.label}")
    else:
        reasons.append(f"first layout: {best.label}")
    return best.placed, PoolPlan(
        pool.name, gpus, best.goodput, best.outlook, tuple(reasons), _rejected(ranked[1:], current), Verdict.CHANGE
    )


def _in_spite(current: _Valued, best: _Valued) -> str:
    """Why a shape of less goodput wins: the tiers that come nearer to their targets by it."""
    if best.goodput >= current.goodput:
        return ""
    then = {t.tier: min(t.slack, 1.0) for t in best.outlook}
    shares = [(t.tier, min(t.slack, 1.0), then[t.tier]) for t in current.outlook]
    gains = [f"{tier} would meet {now:.0%} of its requests now, {after:.0%} then" for tier, now, after in shares if after > now]
    costs = [f"{tier} {now:.0%} now, {after:.0%} then" for tier, now, after in shares if after < now]
    return f"; {', '.join(gains + costs)}; targets come before goodput, by weight" if gains else ""


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
    taken: dict[str, str] = {}
    """Pool by GPU."""
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
        placed, pool_plan = _decide(view, now, taken)
        pools.append(pool_plan)
        before = {n.node.agent_id: {g.engine_id for g in n.layout.groups if g.pool == pool.name} for n in snapshot.nodes}
        after: dict[str, set[str]] = {}
        for p in placed:
            groups[p.agent_id].append(_group(view, p) if tps and set(p.tiers) & set(demand) else _as_runs(snapshot, p))
            taken |= dict.fromkeys(p.engine.gpu_uuids, pool.name)
            after.setdefault(p.agent_id, set()).add(p.engine.engine_id)
        for agent_id in owned:
            engines[agent_id] += [view.engine(agent_id, b) for tp in tps for b in view.blocks(agent_id, tp)]
            if before[agent_id] and before[agent_id] != after.get(agent_id, set()):
                changing.add(agent_id)
        assert sum(p.engine.tp_size for p in placed) <= pool.budget_gpus, f"{pool.name}: above its budget"
    late = sorted(changing)[snapshot.settings.flips_at_once_max :]
    nodes = []
    names = {p.name for p in snapshot.pools}
    for n in sorted(snapshot.nodes, key=lambda n: n.node.agent_id):
        agent_id = n.node.agent_id
        if not n.schedulable:
            nodes.append(NodePlan(agent_id, n.residency, Layout(tuple(g for g in n.layout.groups if g.pool in names))))
            continue
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
