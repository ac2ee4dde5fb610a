"""The slow plane: which GPUs, at which TP, for which tiers. Any number of pools share the fleet under their budgets.

1. Pools that may not change now (no fresh demand, a flip running, cooling down, Frozen) keep what runs; their GPUs are barred to others.
2. For the rest one joint Problem. `base`: what runs, and groups on GPUs that are idle, which disturbs nothing. `best`: the better of exact
   (HiGHS) and greedy. It replaces `base` only where its score, less what the switch loses, is more by `gain_min`.
3. Counts become GPUs with the least disturbance; GPUs that are still idle get the widest group that fits.

Invariants, asserted before a plan leaves: no GPU twice, never above a budget (GPUs that lost nodes may hold count), engines of a layout
are resident.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from nitsum.layout import Capacity as GroupCapacity
from nitsum.layout import Group, Layout, TierShare
from nitsum.planner import exact, greedy
from nitsum.planner.capacity import Capacity
from nitsum.planner.place import Placed, Running, Slot, place
from nitsum.planner.problem import Answer, Counts, Problem, value
from nitsum.planner.question import PoolQuestion, ask, batch_of, flip_loss, problem
from nitsum.planner.types import NodePlan, NodeView, Plan, PoolPlan, Snapshot, TierOutlook, Verdict
from nitsum.pool import AdaptationMode
from nitsum.residency import Residency, ResidentEngine

QUEUE_PER_RUNNING = 4
"""Waiting requests that a group may hold for each running one."""


def describe(groups: Iterable[int]) -> str:
    """TP degrees as people say them."""
    widths = list(groups)
    return " + ".join(f"{widths.count(tp)}xTP{tp}" for tp in sorted(set(widths))) or "nothing"


def hold(q: PoolQuestion, snapshot: Snapshot, now: float) -> str:
    """Why the pool keeps what runs; empty: it may change."""
    settings = snapshot.settings
    if not q.nodes:
        return "no GPU within budget and selector"
    if not q.tps:
        return f"no legal TP among {list(q.pool.allowed_tp) or 'any'}"
    if not q.running:
        return ""
    fresh = [d for d in snapshot.demand if d.pool == q.pool.name]
    mine = {agent_id for _, agent_id, _ in q.running}
    if not fresh or all(now - d.observed_at > settings.stale_after_s for d in fresh):
        return "no fresh demand report: the last safe layout stays"
    if any(n.flipping for n in q.nodes if n.node.agent_id in mine) or any(d.frozen for d in fresh):
        return "a flip is running"
    flipped = [n.last_flip_at for n in q.nodes if n.node.agent_id in mine and n.last_flip_at is not None]
    if flipped and now - max(flipped) < settings.cooldown_s:
        return f"cooling down for {settings.cooldown_s:g} s after the last flip"
    return ""


class SlowPlane:
    """Implements `Planner`. Remembers capacities between calls; equal snapshots give equal plans all the same."""

    def __init__(self, use_exact: bool = True) -> None:
        self._capacity, self._use_exact = Capacity(), use_exact

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        questions = [ask(p, snapshot) for p in sorted(snapshot.pools, key=lambda p: p.name)]
        held = {q.pool.name: why for q in questions if (why := hold(q, snapshot, now))}
        stays = [q for q in questions if q.pool.name in held or (q.running and q.pool.mode is not AdaptationMode.ACTIVE)]
        moves = [q for q in questions if q not in stays]
        barred = frozenset(u for q in stays for _, _, uuids in q.running for u in uuids)
        placed: list[Placed] = [p for q in stays for p in _as_placed(q)]
        pools: list[PoolPlan] = [self._kept(q, snapshot, held.get(q.pool.name, ""), barred) for q in stays]
        if moves:
            chosen, plans = self._decide(moves, snapshot, barred)
            placed += chosen
            pools += plans
        return self._plan(questions, snapshot, placed, pools)

    def _kept(self, q: PoolQuestion, snapshot: Snapshot, why: str, barred: frozenset[str]) -> PoolPlan:
        """A pool that keeps what runs; Advisory also says what it would do."""
        if not q.nodes or not q.tps:
            return PoolPlan(q.pool.name, q.gpus, 0.0, (), (why,), verdict=Verdict.BLOCKED)
        own = frozenset(u for _, _, uuids in q.running for u in uuids)
        asked, _, counts = problem([q], snapshot, self._capacity, barred - own)
        current = self._at_best(asked, value(asked, counts, "as it runs"))
        if not why:
            best = self._best(asked)
            why = f"{q.pool.mode}: {describe(len(u) for _, _, u in q.running)} stays"
            if best.score > current.score * (1 + snapshot.settings.gain_min):
                why = (
                    f"{q.pool.mode}: would change {describe(len(u) for _, _, u in q.running)} to {_shape(asked, best.counts, q.pool.name)}"
                )
        return PoolPlan(q.pool.name, q.gpus, _goodput(q, current), _outlook(q, asked, current), (_profile(q, snapshot), why))

    def _at_best(self, asked: Problem, answer: Answer) -> Answer:
        """The same groups with the best flows through them, so that answers are compared at their best."""
        if not self._use_exact:
            return answer
        try:
            return exact.solve(asked, fixed=answer.counts, by=answer.by) or answer
        except Exception:  # boundary to a foreign solver; the greedy flows stand
            return answer

    def _best(self, asked: Problem) -> Answer:
        """The better of exact and greedy. A solver that fails is no reason to stand still."""
        fallback = self._at_best(asked, greedy.solve(asked))
        if not self._use_exact:
            return fallback
        try:
            found = exact.solve(asked, start=fallback)
        except Exception as e:  # boundary to a foreign solver
            return replace(fallback, note=f"the exact solver failed ({type(e).__name__}: {e}); greedy decided")
        if found is None:
            return replace(fallback, note="the exact solver found nothing; greedy decided")
        return found if found.score >= fallback.score else replace(fallback, note="greedy found more than the bounded exact search")

    def _decide(self, moves: list[PoolQuestion], snapshot: Snapshot, barred: frozenset[str]) -> tuple[list[Placed], list[PoolPlan]]:
        settings = snapshot.settings
        asked, members, counts = problem(moves, snapshot, self._capacity, barred)
        current = self._at_best(asked, value(asked, counts, "as it runs"))
        legal = asked.legal(counts)
        losses = {q.pool.name: flip_loss(q, snapshot, sum(_score(asked, current, q.pool.name))) for q in moves if q.running}
        asked = replace(asked, flip_loss=losses)
        base = self._at_best(asked, greedy.solve(asked, counts)) if legal and counts else None
        best = self._best(asked)
        change = base is None or best.score > base.score * (1 + settings.gain_min)
        answer = best if change else base
        assert answer is not None
        running: Running = {key: tiers for q in moves for key, tiers in q.running.items()}
        placed = _placed(asked, answer.counts, members, running, barred)
        if placed is None and base is not None:
            answer, change, placed = base, False, _placed(asked, base.counts, members, running, barred)
        if placed is None:
            placed = [p for q in moves for p in _as_placed(q)]
        placed = _fill(moves, asked, placed, barred)
        plans = []
        for q in moves:
            name = q.pool.name
            mine = [p for p in placed if p.pool == name]
            was, will = describe(len(u) for _, _, u in q.running), describe(len(p.gpus) for p in mine)
            same = {p.key for p in mine} == set(q.running)
            reasons = [_profile(q, snapshot), *([best.note] if best.note else [])]
            before, after = _goodput(q, current), _goodput(q, answer)
            if same:
                gain = best.score / base.score - 1 if base is not None and base.score > 0 else 0.0
                reasons.append(f"{was} stays: the best other shape gains {max(gain, 0):.0%}, {settings.gain_min:.0%} is asked")
            elif not q.running:
                reasons.append(f"first layout: {will}")
            elif not change:
                reasons.append(f"its GPUs changed: {was} -> {will}")
            else:
                reasons.append(
                    f"{was} -> {will}: expected goodput {before:.2f} -> {after:.2f} requests/s, expected to last {settings.dwell_s:g} s"
                )
            rejected = [] if answer is base and best is not base else ([f"{was} as it runs: {before:.2f} requests/s"] if q.running else [])
            if not change and base is not None and best.counts != base.counts:
                rejected.append(f"{_shape(asked, best.counts, name)}: {_goodput(q, best):.2f} requests/s, not worth the switch")
            verdict = Verdict.KEEP if same else Verdict.CHANGE
            gpus = sum(len(p.gpus) for p in mine)
            plans.append(PoolPlan(name, gpus, after, _outlook(q, asked, answer), tuple(reasons), tuple(rejected), verdict))
        return placed, plans

    def _plan(self, questions: list[PoolQuestion], snapshot: Snapshot, placed: list[Placed], pools: list[PoolPlan]) -> Plan:
        by_name = {q.pool.name: q for q in questions}
        for q in questions:
            assert sum(len(p.gpus) for p in placed if p.pool == q.pool.name) <= max(q.pool.budget_gpus, q.gpus), (
                f"{q.pool.name}: above its budget"
            )
        before = {n.node.agent_id: n for n in snapshot.nodes}
        wanted = {a: {(p.pool, tuple(g.uuid for g in p.gpus)) for p in placed if p.agent_id == a} for a in before}
        runs = {a: {(g.pool, g.gpu_uuids) for g in n.layout.groups} for a, n in before.items()}
        changing = sorted(a for a in before if runs[a] and runs[a] != wanted[a])
        late = set(changing[snapshot.settings.flips_at_once_max :])
        nodes = []
        for agent_id, n in sorted(before.items()):
            if agent_id in late:
                nodes.append(NodePlan(agent_id, n.residency, n.layout))
                continue
            mine = [p for p in placed if p.agent_id == agent_id]
            groups = [self._group(by_name[p.pool], snapshot, n, p) for p in mine]
            nodes.append(NodePlan(agent_id, _residency(by_name, n, mine, groups), Layout(tuple(sorted(groups, key=lambda g: g.group_id)))))
        digest = hashlib.sha256(repr([(n.agent_id, n.residency, n.layout) for n in nodes]).encode()).hexdigest()
        return Plan(digest[:12], tuple(nodes), tuple(sorted(pools, key=lambda p: p.pool)))

    def _group(self, q: PoolQuestion, snapshot: Snapshot, n: NodeView, p: Placed) -> Group:
        uuids = tuple(g.uuid for g in p.gpus)
        runs = next((g for g in n.layout.groups if g.pool == p.pool and g.gpu_uuids == uuids), None)
        if runs is not None and (not q.tps or not q.nodes):
            return runs  # carried on: nothing about it can be computed now
        tiers = (*p.tiers, *(q.background if not p.tiers or (q.slo_tiers and q.slo_tiers[-1].name in p.tiers) else ()))
        batch, rate, prompt = batch_of(q, snapshot, self._capacity, len(p.gpus), p.tiers)
        rates = {t: q.demand[t].rate for t in p.tiers if t in q.demand}
        total = sum(rates.values())
        shares = tuple(TierShare(t, round(rates[t] / total, 3) if t in rates and total > 0 else 0.0) for t in dict.fromkeys(tiers))
        kv_tokens = snapshot.step_times[p.pool].kv_capacity_tokens(len(p.gpus), q.tps)
        most = max(batch, 1) if q.slo_tiers else 0
        limits = GroupCapacity(most, kv_tokens, round(rate * prompt, 1), most * QUEUE_PER_RUNNING + 8)
        name = engine_id(p.pool, p.gpus[0].index, len(p.gpus))
        return Group(name, name, p.pool, q.pool.model, len(p.gpus), uuids, shares=shares, capacity=limits)


def engine_id(pool: str, first_index: int, tp_size: int) -> str:
    return f"{pool.replace('/', '.')}-tp{tp_size}-{first_index}"


def _as_placed(q: PoolQuestion) -> list[Placed]:
    gpus = {g.uuid: g for n in q.nodes for g in n.node.gpus}
    return [
        Placed(p, a, tuple(gpus[u] for u in uuids), tiers)
        for (p, a, uuids), tiers in sorted(q.running.items())
        if all(u in gpus for u in uuids)
    ]


def _placed(asked: Problem, counts: Counts, members: list[list[NodeView]], running: Running, barred: frozenset[str]) -> list[Placed] | None:
    found: list[Placed] = []
    for c, nodes in enumerate(members):
        slots = [
            Slot(asked.kinds[k].pool, asked.kinds[k].tp_size, asked.kinds[k].tiers, n) for (of, k), n in sorted(counts.items()) if of == c
        ]
        part = place(slots, nodes, running, barred)
        if part is None:
            return None
        found += part
    return found


def _fill(moves: list[PoolQuestion], asked: Problem, placed: list[Placed], barred: frozenset[str]) -> list[Placed]:
    """GPUs that no answer used: the widest group that fits within the budget, for every tier (smallest where there is no SLO)."""
    used = set(barred) | {g.uuid for p in placed for g in p.gpus}
    result = list(placed)
    for q in moves:
        left = asked.budgets[q.pool.name] - sum(len(p.gpus) for p in result if p.pool == q.pool.name)
        tiers = tuple(t.name for t in q.slo_tiers)
        for tp_size in sorted(q.tps, reverse=bool(tiers)):
            for n in q.nodes:
                for block in n.node.blocks(tp_size):
                    if tp_size <= left and not used & {g.uuid for g in block}:
                        used |= {g.uuid for g in block}
                        left -= tp_size
                        result.append(Placed(q.pool.name, n.node.agent_id, block, tiers))
    return sorted(result, key=lambda p: p.key)


def _residency(by_name: dict[str, PoolQuestion], n: NodeView, mine: list[Placed], groups: list[Group]) -> Residency:
    """Every legal TP on every block of the GPUs that a pool holds on the node."""
    engines: dict[str, ResidentEngine] = {}
    for pool in sorted({p.pool for p in mine}):
        q = by_name[pool]
        held = {g.uuid for p in mine if p.pool == pool for g in p.gpus}
        for tp_size in q.tps:
            for block in n.node.blocks(tp_size):
                if {g.uuid for g in block} <= held:
                    name = engine_id(pool, block[0].index, tp_size)
                    engines[name] = ResidentEngine(name, q.pool.model, tp_size, tuple(g.uuid for g in block))
    for g in groups:
        engines.setdefault(g.engine_id, ResidentEngine(g.engine_id, g.model, g.tp_size, g.gpu_uuids))
    return Residency(tuple(engines[i] for i in sorted(engines)))


def _profile(q: PoolQuestion, snapshot: Snapshot) -> str:
    times = snapshot.step_times[q.pool.name]
    return f"profile {getattr(times, 'name', '?')} ({times.origin})"


def _shape(asked: Problem, counts: Counts, pool: str) -> str:
    mine: dict[str, int] = {}
    for (_, k), n in sorted(counts.items()):
        if asked.kinds[k].pool == pool:
            mine[asked.kinds[k].label] = mine.get(asked.kinds[k].label, 0) + n
    return ", ".join(f"{n} x {label}" for label, n in mine.items()) or "nothing"


def _goodput(q: PoolQuestion, answer: Answer) -> float:
    return sum(answer.served.get((q.pool.name, t.name), 0.0) for t in q.slo_tiers)


def _score(asked: Problem, answer: Answer, pool: str) -> list[float]:
    """Of one pool's tiers: what it earns."""
    earned = []
    for w in asked.wants:
        if w.pool == pool:
            left = answer.safe[w.pool, w.tier]
            for width, worth in w.pieces():
                earned.append(min(left, width) * worth)
                left -= min(left, width)
    return earned


def _outlook(q: PoolQuestion, asked: Problem, answer: Answer) -> tuple[TierOutlook, ...]:
    found = []
    for t in q.slo_tiers:
        key = q.pool.name, t.name
        rate = q.demand[t.name].rate
        served, safe = answer.served.get(key, 0.0), answer.safe.get(key, 0.0)
        limits = {k.binding[k.tiers.index(t.name)] for k in asked.kinds if k.pool == q.pool.name and k.tiers == (t.name,)}
        used = [
            asked.kinds[k] for (k, tier), flow in answer.flows.items() if tier == t.name and flow > 0 and asked.kinds[k].pool == q.pool.name
        ]
        binding = used[0].binding[used[0].tiers.index(t.name)] if used else " or ".join(sorted(limits)) + " at every TP"
        found.append(TierOutlook(t.name, rate, safe, served >= t.target * rate - 1e-9, binding))
    return tuple(found)
