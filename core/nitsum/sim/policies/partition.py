"""`static-partition`: tiers apart on layouts that never change, the best in hindsight.

Search: tiers by strictness are cut into runs, each run gets groups of one TP; every such partition is valued with the true mean demand of
the whole workload, and the best CANDIDATES of them are simulated. It is told what will come, and may still miss a better one.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nitsum.demand import TierDemand
from nitsum.objective import mixture, safe_rate, strictest
from nitsum.pool import AdaptationMode, Tier
from nitsum.sim.arrivals import Traffic
from nitsum.sim.demand import Foresight
from nitsum.sim.fleet import Fleet
from nitsum.sim.metrics import met_all
from nitsum.sim.policies import Policy
from nitsum.sim.policies.layouts import Part, partition
from nitsum.sim.policies.registry import Setting, with_engines
from nitsum.sim.policies.standing import Standing
from nitsum.sim.result import RunResult
from nitsum.sim.steptimes import QuickModel

NAME = "static-partition"
CANDIDATES = 6
SHARES_MAX = 32
"""Parts of the fleet that the search tells apart."""


@dataclass(frozen=True)
class _Kind:
    tp_size: int
    tiers: tuple[str, ...]
    offered: float
    safe: float


def _cuts(tiers: list[Tier]) -> Iterator[list[list[Tier]]]:
    """All ways to cut the ordered tiers into runs, one run included."""
    for bits in itertools.product((False, True), repeat=max(len(tiers) - 1, 0)):
        runs = [[tiers[0]]]
        for t, cut in zip(tiers[1:], bits, strict=True):
            if cut:
                runs.append([t])
            else:
                runs[-1].append(t)
        yield runs


def _counts(gpus: int, parts: int, unit: int) -> Iterator[tuple[int, ...]]:
    """GPUs of each part, in multiples of `unit`, all given away."""
    if parts == 1:
        yield (gpus,)
        return
    for first in range(unit, gpus - unit * (parts - 1) + 1, unit):
        for rest in _counts(gpus - first, parts - 1, unit):
            yield first, *rest


def _ranked(s: Setting, demand: dict[str, TierDemand]) -> list[tuple[Part, ...]]:
    key = lambda t: (t.tpot_ms or float("inf"), t.ttft_ms or float("inf"), t.name)  # noqa: E731
    tiers = sorted((t for t in s.pool.tiers if not t.background and demand[t.name].rate > 0), key=key)
    rest = tuple(t.name for t in s.pool.tiers if t not in tiers)
    model, gpus = QuickModel(s.model), min(s.pool.budget_gpus, sum(len(n.gpus) for n in s.nodes))
    if not tiers:  # what has no targets is served at the least TP, as by our planner
        return [(Part(min(s.tps), gpus // min(s.tps), rest),)]
    unit = max(min(s.tps), gpus // SHARES_MAX)
    safe: dict[tuple[int, tuple[str, ...]], _Kind] = {}

    def kind(tp_size: int, run: list[Tier], last: bool) -> _Kind:
        names = tuple(t.name for t in run)
        if (tp_size, names) not in safe:
            load = mixture(tuple(demand[n] for n in names))
            best = 0.0
            for level in range(len(run)):
                rate, _, _ = safe_rate(model, tp_size, load, strictest(tuple(run[level:])), (tp_size,))
                held = sum(demand[t.name].rate for t in run[level:]) / load.rate
                best = max(best, rate * held)
            safe[tp_size, names] = _Kind(tp_size, names, load.rate, best)
        return safe[tp_size, names]

    found: dict[tuple[Part, ...], float] = {}
    for runs in _cuts(tiers):
        for tps in itertools.product(s.tps, repeat=len(runs)):
            kinds = [kind(tp, run, run is runs[-1]) for tp, run in zip(tps, runs, strict=True)]
            for share in _counts(gpus, len(runs), unit):
                if any(n < k.tp_size for n, k in zip(share, kinds, strict=True)):
                    continue
                worth = sum(min(n // k.tp_size * k.safe, k.offered) for n, k in zip(share, kinds, strict=True))
                slack = min(n // k.tp_size * k.safe / k.offered for n, k in zip(share, kinds, strict=True))
                parts = tuple(
                    Part(k.tp_size, n // k.tp_size, (*k.tiers, *(rest if i == len(kinds) - 1 else ())))
                    for i, (n, k) in enumerate(zip(share, kinds, strict=True))
                )
                found[parts] = worth + 1e-3 * min(slack, 2.0)
    return sorted(found, key=lambda p: (-found[p], len(p), str(p)))


def best(s: Setting, traffic: Traffic, progress: Callable[[float], None], name: str = NAME) -> RunResult:
    """`name`: `apart` has stock engines."""
    seen = Foresight(s.pool.name, tuple(t.name for t in s.pool.tiers), traffic)(0.0, traffic.duration_s)
    results: list[tuple[int, tuple[Part, ...], RunResult]] = []
    for parts in _ranked(s, {d.tier: d for d in seen}):
        first = partition(s.pool, s.nodes, parts)
        if first is None:
            continue
        tps = tuple(sorted({p.tp_size for p in parts}))
        pool = replace(s.pool, allowed_tp=tps, mode=AdaptationMode.FROZEN)
        # One engine per GPU: its memory is its own, whatever TP others have.
        policy = with_engines(Policy(name, pool, s.flip_cost, tps if len(tps) == 1 else (), Standing, first, s.settings))
        result = Fleet(policy, s.nodes, s.model, traffic).run(lambda at: progress((len(results) * traffic.duration_s + at) / CANDIDATES))
        results.append((met_all(s.pool, result), parts, result))
        if len(results) == CANDIDATES:
            break
    assert results, "not even one group for all tiers fits"
    _, parts, result = max(results, key=lambda r: r[0])
    text = ", ".join(f"{p.count} x TP{p.tp_size} for {'+'.join(p.tiers)}" for p in parts)
    return replace(result, note=f"{text}; the best of {len(results)} that were simulated, chosen by their analytic value")
