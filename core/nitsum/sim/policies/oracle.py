"""`oracle`: our planner where switches are free and keep KV, told the true demand of the coming window; the best in hindsight.

What it searches: true demand of windows of FORESIGHT_S, planned with and without headroom, and the estimated demand that `nitsum` has;
`nitsum` itself, and the best static partition, so that it bounds both. Its plans are our planner's: a better one would find better ones.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from nitsum.pool import AdaptationMode
from nitsum.sim.arrivals import Traffic
from nitsum.sim.fleet import Fleet
from nitsum.sim.metrics import met_all
from nitsum.sim.policies import Policy, governed, partition
from nitsum.sim.policies.registry import FixedPause, Setting, build, keeping
from nitsum.sim.result import RunResult

NAME = "oracle"
FORESIGHT_S = (10.0, 30.0)


def _candidates(s: Setting) -> Iterator[tuple[str, Policy]]:
    pool = replace(s.pool, mode=AdaptationMode.ACTIVE)
    settings = replace(s.settings, cooldown_s=0.0, flips_at_once_max=10**6)
    for seconds in FORESIGHT_S:
        policy = Policy(
            NAME,
            pool,
            FixedPause(0.0, s.kv_load),
            s.resident_tp,
            keeping(s.planner),
            None,
            settings,
            foresight_s=seconds,
            limits=governed,
            kv_load=s.kv_load,
        )
        yield f"the true demand of the coming {seconds:g} s", policy
    yield "the demand that nitsum estimates", replace(build("nitsum@free", s), settings=settings)
    yield "nitsum itself", build("nitsum", s)


def best(s: Setting, traffic: Traffic, progress: Callable[[float], None], known: Mapping[str, RunResult]) -> RunResult:
    """`known`: by policy, of this setting and traffic."""
    results: list[tuple[int, str, RunResult]] = []
    runs = list(_candidates(s))

    def passed(at: float) -> None:
        progress((len(results) * traffic.duration_s + at) / (len(runs) + 1))

    for told, policy in runs:
        done = known.get("nitsum") if policy.name == "nitsum" else None
        result = done or Fleet(policy, s.nodes, s.model, traffic).run(passed)
        results.append((met_all(s.pool, result), told, result))
    bound = known.get(partition.NAME) or partition.best(s, traffic, passed)
    results.append((met_all(s.pool, bound), f"nothing, and nothing changed: {bound.note}", bound))
    _, told, result = max(results, key=lambda r: r[0])
    note = f"our planner, switches free and KV kept; the best of {len(results)} in hindsight: told {told}; its search is our planner's"
    return replace(result, policy=NAME, note=note)
