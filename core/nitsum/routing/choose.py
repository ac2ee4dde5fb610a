"""Which group takes a request: the least loaded, or one that may have its prompt's KV."""

from dataclasses import dataclass

from nitsum.routing.routes import Routes, View
from nitsum.routing.view import AdmissionClass, GroupView, Key, Warm

GAP = 0.25
"""How much fuller than the least loaded a group may be, in parts of what it can run within SLO, that has the KV of a whole prompt; as much
less as it has less of it. What it costs if nothing is found: docs/benchmarks.md."""
FROM_STORE = 0.5
"""What KV in the node's store is worth beside KV in the engine: it must be loaded, and the store is small."""


@dataclass(frozen=True)
class Choice:
    """Groups to try, best first (at most two)."""

    groups: tuple[GroupView, ...]
    admission: AdmissionClass


def decide(
    tier: str,
    background: bool,
    view: View,
    avoid: frozenset[tuple[str, str]] = frozenset(),
    started: bool = False,
    warm: tuple[Warm, ...] = (),
) -> Choice | None:
    """Least loaded first, groups meant for the tier before others, of those the ones whose role suits; those that just refused it last.
    What has no token yet goes to groups that only decode where nothing else serves it. None: nothing serves.

    Before all of them comes the first of `warm`, longest prefix first, that would start it at once and is not much fuller (`GAP`)."""
    if isinstance(view, Routes):
        groups, meant = view.best(tier, started, avoid)
    else:
        open_groups = [g for g in view if g.serving]
        pool = [g for g in open_groups if not g.tiers or tier in g.tiers]
        meant = bool(pool)
        pool = pool or open_groups
        if not started and any(g.role.suits(False) and not g.hint for g in pool):
            pool = [g for g in pool if g.role.suits(False)]
        ordered = sorted(pool, key=lambda g: (g.key in avoid, not g.role.suits(started), g.hint, not g.feasible, g.load, g.key))
        groups = tuple(ordered[:2])
    if not groups:
        return None
    if warm and (g := _with_prefix(tier, view, avoid, started, warm, groups[0].load)) is not None:
        groups = (g, *[o for o in groups if o.key != g.key][:1])
    admission = AdmissionClass.FEASIBLE if meant and groups[0].feasible else AdmissionClass.BEST_EFFORT
    return Choice(groups, AdmissionClass.BACKGROUND if background else admission)


def _with_prefix(tier: str, view: View, avoid: frozenset[Key], started: bool, warm: tuple[Warm, ...], least: float) -> GroupView | None:
    """The group with the longest prefix, else the best one of its node, if it is all that comes before load in the order and has no queue:
    where there is one, the least loaded is feasible too. Groups that have less of it than the node's store is worth are not looked at."""

    def fits(g: GroupView, share: float) -> bool:
        return (
            g.load <= least + GAP * share
            and not g.queued
            and g.feasible
            and g.serving
            and not g.hint
            and (not g.tiers or tier in g.tiers)
            and g.role.suits(started)
            and g.key not in avoid
        )

    stored = warm[0].share * FROM_STORE
    get = view.get if isinstance(view, Routes) else {g.key: g for g in view}.get
    for w in warm:
        if w.share >= stored and (g := get(w.key)) is not None and g.epoch == w.epoch and fits(g, w.share):
            return g
    node = warm[0].key[0]
    near = view.on_node(node) if isinstance(view, Routes) else [g for g in view if g.key[0] == node]
    return min((g for g in near if fits(g, stored)), key=lambda g: (g.load, g.key), default=None)
