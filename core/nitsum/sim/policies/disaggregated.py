"""`static-pd`: prefill and decode on groups of their own, one TP, on layouts that never change; the best ratio in hindsight.

Every node has as many prefill groups: a request is handed over inside its node. Each (TP, ratio) is valued with the true mean demand of the
whole workload, as the smaller of what its prefill and its decode groups can safely take, and the best CANDIDATES are simulated.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from nitsum.demand import TierDemand
from nitsum.errors import InvalidSpec
from nitsum.layout import Layout, Role
from nitsum.planner.capacity import Capacity, mark
from nitsum.planner.offer import Asked, safe_in
from nitsum.planner.sharing import crowd_of, runs_of
from nitsum.pool import AdaptationMode
from nitsum.sim.arrivals import Traffic
from nitsum.sim.demand import Foresight
from nitsum.sim.fleet import Fleet
from nitsum.sim.metrics import met_all
from nitsum.sim.policies import Policy
from nitsum.sim.policies.layouts import uniform
from nitsum.sim.policies.registry import Setting, with_engines
from nitsum.sim.policies.standing import Standing
from nitsum.sim.result import RunResult
from nitsum.sim.steptimes import QuickModel

NAME = "static-pd"
CANDIDATES = 6


def split(layouts: Mapping[str, Layout], prefill: int) -> dict[str, Layout]:
    """The first `prefill` groups of each node prefill, the others decode."""

    def role(i: int) -> Role:
        return Role.PREFILL if i < prefill else Role.DECODE

    return {a: Layout(tuple(replace(g, role=role(i)) for i, g in enumerate(la.groups))) for a, la in layouts.items()}


def _splits(s: Setting) -> Iterator[tuple[int, int, dict[str, Layout]]]:
    """(TP, prefill groups of each node, layouts). A node whose groups all have one role could not hand over."""
    for tp_size in s.tps:
        layouts = uniform(s.pool, s.nodes, tp_size, f"policy {NAME}")
        fewest = min((len(la.groups) for la in layouts.values() if la.groups), default=0)
        for prefill in range(1, fewest):
            yield tp_size, prefill, split(layouts, prefill)


class _Quick:
    """Implements KvLoad: where nothing tells what a copy takes, it takes nothing."""

    def load_ms(self, tokens: int, tp_size: int) -> float | None:
        return 0.0


def _worth(
    s: Setting, model: QuickModel, demand: Mapping[str, TierDemand], tp_size: int, layouts: Mapping[str, Layout], capacity: Capacity
) -> float:
    """requests/s that its groups can take with the targets of as many tiers as earn most; the strictest are given up first."""
    key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
    tiers = tuple(sorted((t for t in s.pool.tiers if not t.background and demand[t.name].rate > 0), key=key))
    rates, marks = {t.name: demand[t.name].rate for t in tiers}, {t.name: mark(demand[t.name]) for t in tiers}
    whole, best = sum(rates.values()), 0.0
    gpus = max(len(n.gpus) for n in s.nodes)
    a = Asked(s.pool.name, tiers, marks, rates, (tp_size,), s.pool.budget_gpus, gpus, model, s.kv_load or _Quick())
    for level in range(len(tiers)):
        sharing = next(run for run in runs_of(tiers[level:]) if len(run) == len(tiers) - level)
        held = sum(rates[t] for t, _, _ in sharing)
        able = []
        for role in (Role.PREFILL, Role.DECODE):
            groups = sum(g.role is role for la in layouts.values() for g in la.groups)
            safe = safe_in(role, a, capacity, tp_size, sharing, crowd_of(groups, 1.0))
            busy = sum(rates[t] / of.rate if of.rate > 0 else math.inf for (t, _, _), of in zip(sharing, safe, strict=True))
            able.append(groups * held / busy)
        best = max(best, (min(*able, whole) + 1e-3 * min(able)) * held / whole)
    return best


def best(s: Setting, traffic: Traffic, progress: Callable[[float], None], name: str = NAME) -> RunResult:
    """Raises InvalidSpec where no node has room for two groups."""
    seen = {d.tier: d for d in Foresight(s.pool.name, tuple(t.name for t in s.pool.tiers), traffic)(0.0, traffic.duration_s)}
    model, found, capacity = QuickModel(s.model), list(_splits(s)), Capacity(governed=True)
    if not found:
        raise InvalidSpec(f"policy {name}", f"no node has room for a prefill and a decode group of TP {min(s.tps)}")
    ranked = sorted(found, key=lambda c: (-_worth(s, model, seen, c[0], c[2], capacity), c[:2]))[:CANDIDATES]
    results: list[tuple[int, str, RunResult]] = []
    for tp_size, prefill, first in ranked:
        pool = replace(s.pool, allowed_tp=(tp_size,), mode=AdaptationMode.FROZEN)
        policy = with_engines(Policy(name, pool, s.flip_cost, (tp_size,), Standing, first, s.settings, kv_load=s.kv_load))
        at_share = lambda at: progress((len(results) * traffic.duration_s + at) / len(ranked))  # noqa: E731
        result = Fleet(policy, s.nodes, s.model, traffic).run(at_share)
        decode = max(len(la.groups) for la in first.values()) - prefill
        results.append((met_all(s.pool, result), f"TP{tp_size}, {prefill} prefill and {decode} decode groups a node", result))
    _, text, result = max(results, key=lambda r: r[0])
    return replace(result, note=f"{text}; the best of {len(results)} that were simulated, chosen by their analytic value")
