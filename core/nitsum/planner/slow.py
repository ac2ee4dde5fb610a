"""The slow plane: which GPUs, at which TP, for which tiers. Any number of pools share the fleet under their budgets.

1. What runs is first made to fit what is asked: groups that the spec, the model, the GPUs or the budget no longer have room for end, idle
   GPUs are filled. That is repair, in every mode; anything more is a change, and must win.
2. Pools that may not change now (no fresh demand, a flip running, cooling down, not Active) get no more than that; their GPUs are barred
   to others.
3. For the rest one joint Problem. `base`: what runs after repair, with the best labels. `best`: the better of exact (HiGHS) and greedy,
   with shared groups or without, less what misses all the same (`rating`). It replaces `base` only where its score, less what the switch
   loses, is more by `gain_min`, in the search's numbers and once both are laid out and labelled (`laid`); of two that do, the one that
   earns more then, or leaves fewer tiers short for nearly as much.
4. Counts become GPUs with the least disturbance; which tiers each group serves is the fast plane's business (`serve`).
"""

from collections import ChainMap
from dataclasses import dataclass, replace

from nitsum.planner import exact, greedy, laid
from nitsum.planner.alternatives import alternatives
from nitsum.planner.answer import Answer, value, wins
from nitsum.planner.capacity import Capacity
from nitsum.planner.compose import compose
from nitsum.planner.decided import Decided, as_placed
from nitsum.planner.joint import counts_of, flip_loss, problem
from nitsum.planner.kinds import kinds, standing
from nitsum.planner.laid import Laid
from nitsum.planner.place import Placed, Running, Slot, place
from nitsum.planner.problem import Counts, Kind, Problem
from nitsum.planner.question import PoolQuestion, ask, stale
from nitsum.planner.rating import apart, rated
from nitsum.planner.reasons import pool_plan
from nitsum.planner.repair import fill, repaired
from nitsum.planner.serve import Serving, as_kinds, relabelled, serve
from nitsum.planner.steady import dwell, gain_asked, hold
from nitsum.planner.types import NodeView, Plan, PoolPlan, Snapshot, Verdict
from nitsum.planner.words import goodput, outlook, profile, shape, told
from nitsum.pool import AdaptationMode


@dataclass(frozen=True)
class _Kept:
    """A pool that gets no more than repair."""

    q: PoolQuestion
    why: str


@dataclass(frozen=True)
class _Choice:
    """The question of some pools and its answers: `current` as it runs, `base` with what idle GPUs add, `best`."""

    asked: Problem
    members: list[list[NodeView]]
    runs: dict[str, list[Placed]]
    counts: Counts
    current: Answer
    base: Answer
    found: tuple[Answer, ...]
    """With shared groups or without, the best first."""
    gain_min: float

    @property
    def best(self) -> Answer:
        return self.found[0]

    def changes(self, answer: Answer) -> bool:
        asked, base = self.asked, self.base
        return not self.counts or (asked.widths(answer.counts) != asked.widths(base.counts) and wins(asked, answer, base, self.gain_min))

    @property
    def change(self) -> bool:
        return self.changes(self.best)


class SlowPlane:
    """Implements `Planner`, both planes together. Remembers capacities between calls; equal snapshots give equal plans all the same."""

    def __init__(self, use_exact: bool = True, governed: bool = False, capacity: Capacity | None = None) -> None:
        """`governed`: engines size their prefill steps by TPOT. `capacity`: what a fast plane shares; it says whether they do."""
        self._capacity, self._use_exact = capacity or Capacity(governed), use_exact

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        questions = [ask(p, snapshot) for p in sorted(snapshot.pools, key=lambda p: p.name)]
        why = {q.pool.name: q.blocked or hold(q, snapshot, now) for q in questions}
        kept = [
            _Kept(q, why[q.pool.name]) for q in questions if why[q.pool.name] or (q.running and q.pool.mode is not AdaptationMode.ACTIVE)
        ]
        moves = [q for q in questions if q not in [k.q for k in kept]]
        # What a pool that may not change has, also what it loses only now, is not for others in this plan.
        barred = frozenset(u for k in kept for key in k.q.had for u in key[2])
        decided = self._decide(moves, snapshot, now, barred) if moves else []
        used = set(barred) | {g.uuid for d in decided for p in d.placed for g in p.gpus}
        for k in kept:
            decided.append(self._keep(k, snapshot, now, used))
        return compose(sorted(decided, key=lambda d: d.q.pool.name), snapshot, self._capacity)

    def _keep(self, kept: _Kept, snapshot: Snapshot, now: float, used: set[str]) -> Decided:
        """What runs, repaired; `used` grows by what is filled. Also says what a pool that may not change would do."""
        q, why = kept.q, kept.why
        held = why
        name, settings = q.pool.name, snapshot.settings
        if q.blocked:
            return Decided(
                q, tuple(as_placed(q, snapshot.nodes)), None, PoolPlan(name, q.gpus, 0.0, (), (why,), verdict=Verdict.BLOCKED), True
            )
        found = kinds(q, snapshot, self._capacity)
        placed = as_placed(q)
        ended = {u for key in q.had for u in key[2]} - {u for key in q.running for u in key[2]}
        placed = fill([q], placed, used - ended, found, max(p.widest for p in placed))
        used |= {g.uuid for p in placed for g in p.gpus}
        serving = self._flowing(serve(q, self._seen(q, placed, snapshot, found), placed, settings.gain_min))
        reasons, would = [profile(q, snapshot), *repaired(q, placed)], False
        rejected: tuple[str, ...] = ()
        if not why:
            own = frozenset(g.uuid for p in placed for g in p.gpus)
            choice = self._choice([q], snapshot, now, frozenset(used) - own)
            asked, best, would, was = choice.asked, choice.best, choice.change, told(placed)
            to = shape(asked, best.counts, name)
            why = f"{q.pool.mode}: would change {was} to {to}" if would else f"{q.pool.mode}: {was} stays"
            rejected = (f"{to}: {goodput(q, asked, best):.2f} requests/s, but the mode is {q.pool.mode}",) if would else ()
        verdict = Verdict.KEEP if {p.key for p in placed} == set(q.had) else Verdict.CHANGE
        plan = PoolPlan(
            name,
            sum(len(p.gpus) for p in placed),
            goodput(q, serving.asked, serving.answer),
            outlook(q, found, serving),
            (*reasons, why),
            rejected,
            verdict,
            would,
            held,
        )
        return Decided(q, serving.placed, serving, plan, stale(name, snapshot, now))

    def _at_best(self, asked: Problem, answer: Answer) -> Answer:
        """The same groups with the best flows through them, so that answers are compared at their best."""
        if not self._use_exact or not answer.counts:
            return answer
        try:
            found = exact.solve(asked, fixed=answer.counts, by=answer.by)
        except Exception:  # boundary to a foreign solver; the greedy flows stand
            return answer
        return found if found is not None and found.score > answer.score else answer

    def _flowing(self, serving: Serving) -> Serving:
        """Shares and outlook by the best flows: what is filled greedily may call a tier short that these groups can serve."""
        return replace(serving, answer=self._at_best(serving.asked, serving.answer))

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

    def _choice(self, moves: list[PoolQuestion], snapshot: Snapshot, now: float, barred: frozenset[str]) -> _Choice:
        gain_min = min(gain_asked(q, snapshot, now) for q in moves)
        asked, members, _ = problem(moves, snapshot, self._capacity, barred)
        usual = snapshot.settings.gain_min  # which tiers groups serve is the fast plane's: with its eyes, or labels go to and fro
        runs = {}
        for q in moves:
            stands = as_placed(q)
            runs[q.pool.name] = relabelled(stands, as_kinds(q, self._seen(q, stands, snapshot, asked.kinds), stands, usual))
        running: Running = {p.key: p.tiers for ps in runs.values() for p in ps}
        counts = counts_of(asked.kinds, members, running)
        current = self._at_best(asked, value(asked, counts, "as it runs"))
        losses = [flip_loss(q, snapshot, _score(asked, current, q.pool.name), dwell(q, snapshot, now)) for q in moves]
        asked = replace(asked, flip_loss=dict(ChainMap(*losses)))
        base = self._at_best(asked, greedy.solve(asked, counts) if asked.legal(counts) else value(asked, counts, "as it runs"))
        found = [rated(asked, self._best(asked))]
        if len(asked.wants) > 1 and any(len(asked.kinds[k].tiers) > 1 for _, k in found[0].counts):
            found = sorted((*found, rated(asked, self._best(apart(asked)))), key=lambda a: -a.score)
        return _Choice(asked, members, runs, counts, rated(asked, current), rated(asked, base), tuple(found), gain_min)

    def _seen(self, q: PoolQuestion, placed: list[Placed], snapshot: Snapshot, found: tuple[Kind, ...]) -> tuple[Kind, ...]:
        """Kinds of the groups that there will be, as the fast plane will see them; of split blocks those of `found`."""
        mixed = tuple(k for k in kinds(q, snapshot, self._capacity, standing(placed)) if k.split is None)
        return mixed + tuple(k for k in found if k.split is not None and k.pool == q.pool.name)

    def _servings(self, c: _Choice, placed: list[Placed], moves: list[PoolQuestion], snapshot: Snapshot, anew: bool) -> tuple[Serving, ...]:
        """By pool: which of its groups serve which tiers. `anew`: their labels are a plan's, which only its score keeps."""
        found = []
        for q in moves:
            mine = [p for p in placed if p.pool == q.pool.name]
            seen = self._seen(q, mine, snapshot, c.asked.kinds)
            labels = serve(q, seen, mine, c.gain_min, True, self._at_best) if anew else serve(q, seen, mine, snapshot.settings.gain_min)
            found.append(self._flowing(labels))
        return tuple(found)

    def _laid_out(
        self, c: _Choice, answer: Answer, moves: list[PoolQuestion], snapshot: Snapshot, running: Running, barred: frozenset[str]
    ) -> Laid | None:
        """None where the counts find no place."""
        placed = _placed(c.asked, answer.counts, c.members, running, barred)
        if placed is None:
            return None
        servings = self._servings(c, fill(moves, placed, set(barred), c.asked.kinds), moves, snapshot, True)
        return Laid(answer, servings, c.asked.switch_loss(answer.counts))

    def _staying(self, c: _Choice, moves: list[PoolQuestion], snapshot: Snapshot, barred: frozenset[str]) -> Laid:
        """What runs, with what idle GPUs add."""
        kept = [p for ps in c.runs.values() for p in ps]
        added = {key: n for key, got in c.base.counts.items() if (n := got - c.counts.get(key, 0)) > 0}
        placed = kept + (_placed(c.asked, added, c.members, {}, barred | {g.uuid for p in kept for g in p.gpus}) or [])
        servings = self._servings(c, fill(moves, placed, set(barred), c.asked.kinds), moves, snapshot, False)
        return Laid(c.base, servings, c.asked.switch_loss(c.base.counts))

    def _decide(self, moves: list[PoolQuestion], snapshot: Snapshot, now: float, barred: frozenset[str]) -> list[Decided]:
        c = self._choice(moves, snapshot, now, barred)
        running: Running = {p.key: p.tiers for ps in c.runs.values() for p in ps}
        wins = [a for a in c.found if c.changes(a)] if c.change else []
        options = [o for a in wins if (o := self._laid_out(c, a, moves, snapshot, running, barred)) is not None]
        stays = self._staying(c, moves, snapshot, barred) if c.counts or not options else None
        if c.counts and stays is not None:
            options = [o for o in options if o.wins(stays, c.gain_min)]
        chosen = laid.best(options)
        result, change = chosen or stays, chosen is not None
        assert result is not None
        best = result.answer if change else c.best
        decided = []
        for q, serving in zip(moves, result.servings, strict=True):
            answers, lasts = (c.current, c.base, best, result.answer), dwell(q, snapshot, now)
            plan = pool_plan(q, snapshot, c.asked, serving, answers, change, c.gain_min, lasts)
            if change:
                plan = replace(plan, rejected=(*plan.rejected, *alternatives(c.asked, best, told(serving.placed), q, greedy.solve)))
            decided.append(Decided(q, serving.placed, serving, plan))
        return decided


def _placed(asked: Problem, counts: Counts, members: list[list[NodeView]], running: Running, barred: frozenset[str]) -> list[Placed] | None:
    found: list[Placed] = []
    for c, nodes in enumerate(members):
        slots = [
            Slot(kind.pool, kind.tp_size, kind.tiers, n, kind.split)
            for (of, k), n in sorted(counts.items())
            if of == c
            for kind in [asked.kinds[k]]
        ]
        part = place(slots, nodes, running, barred)
        if part is None:
            return None
        found += part
    return found


def _score(asked: Problem, answer: Answer, pool: str) -> float:
    """What one pool's tiers earn."""
    earned = 0.0
    for w in asked.wants:
        if w.pool == pool:
            left = answer.safe[w.pool, w.tier]
            for width, worth in w.pieces():
                earned += min(left, width) * worth
                left -= min(left, width)
    return earned
