"""The same traffic under several policies, and the JSON that comes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nitsum.sim.arrivals import Traffic
from nitsum.sim.fleet import Fleet
from nitsum.sim.metrics import policy_figures
from nitsum.sim.policies import disaggregated, oracle, partition, profiled, registry
from nitsum.sim.policies.registry import Setting
from nitsum.sim.result import RunResult

Progress = Callable[[str, float], None]
"""(policy, simulated second)"""

SEARCHED = {
    partition.NAME: partition.best,
    "apart": partition.best,
    disaggregated.NAME: disaggregated.best,
    profiled.NAME: profiled.best,
}


@dataclass(frozen=True)
class Comparison:
    """Results by policy, in the order asked for."""

    setting: Setting
    traffic: Traffic
    results: dict[str, RunResult]

    def figures(self) -> dict[str, Any]:
        """`policies.<name>`: the same bytes for the same seed."""
        pool = self.setting.pool
        return {name: policy_figures(pool, r, self.traffic.too_long) for name, r in self.results.items()}


def run(
    names: tuple[str, ...],
    setting: Setting,
    traffic: Traffic,
    progress: Progress = lambda name, second: None,
    known: Mapping[str, RunResult] = MappingProxyType({}),
) -> Comparison:
    """Raises InvalidSpec for a policy that there is not, before anything runs. `known`: results of this very setting and traffic, which the
    oracle, who looks at several policies, does not simulate again."""
    policies = [name if name in SEARCHED or name == oracle.NAME else registry.build(name, setting) for name in names]
    results: dict[str, RunResult] = {}
    for name, policy in zip(names, policies, strict=True):
        said = lambda second, name=name: progress(name, second)  # noqa: E731
        if isinstance(policy, str):
            if policy == oracle.NAME:
                results[name] = oracle.best(setting, traffic, said, {**known, **results})
            else:
                results[name] = SEARCHED[policy](setting, traffic, said, name)
        else:
            results[name] = Fleet(policy, setting.nodes, setting.model, traffic).run(said)
    return Comparison(setting, traffic, results)
