"""`replicas` without a TP: which one it takes, and that it is `replicas-tpN` from there on."""

from dataclasses import replace

import pytest

from nitsum.demand import TierDemand
from nitsum.errors import InvalidSpec
from nitsum.pool import Pool, Tier
from nitsum.sim import arrivals, compare, hardware, metrics, workload
from nitsum.sim.policies import profiled, registry
from nitsum.sim.policies.registry import Setting

from .h100 import PROFILE

STRICT, LOOSE, NEVER = Tier("strict", 2000, 6.5), Tier("loose", 3000, 60), Tier("never", 2000, 0.5)


def setting(*tiers: Tier, gpus: int = 8) -> Setting:
    nodes = hardware.fleet(f"1x{gpus}:h100_sxm", "llama-8b", PROFILE.tp_sizes)
    return Setting(Pool("default/p", "u", "llama-8b", tiers, gpus), nodes, PROFILE, PROFILE)


def demand(*tiers: Tier, rate: float = 1.0) -> list[TierDemand]:
    return [TierDemand("default/p", t.name, rate, 0.0, 1.0, 1000, 0.5, 200, 0.5) for t in tiers]


def test_the_narrowest_that_holds_all_targets_where_it_needs_no_more_gpus() -> None:
    assert profiled.chosen(setting(LOOSE), demand(LOOSE)) == (1, 1, 1)
    tp_size, held, of = profiled.chosen(setting(STRICT, LOOSE), demand(STRICT, LOOSE))
    assert (tp_size, held, of) == (2, 2, 2), "a step of TP 1 takes 6.6 ms, whatever the loose tier would like"


def test_one_that_holds_a_target_only_just_is_not_worth_its_gpus() -> None:
    tight = replace(STRICT, tpot_ms=7)
    s = setting(tight)
    assert profiled.chosen(replace(s, pool=replace(s.pool, allowed_tp=(1,))), demand(tight))[1] == 1, "TP 1 holds it"
    assert profiled.chosen(s, demand(tight))[0] == 2, "with one stream at a time"


def test_what_no_tp_holds_and_what_nobody_asks_for_has_no_say() -> None:
    assert profiled.chosen(setting(NEVER, LOOSE), demand(NEVER, LOOSE)) == (1, 1, 2)
    assert profiled.chosen(setting(STRICT, LOOSE), [*demand(LOOSE), *demand(STRICT, rate=0.0)]) == (1, 1, 1)


def test_every_tier_needs_a_replica() -> None:
    assert profiled.chosen(setting(STRICT, LOOSE, gpus=2), demand(STRICT, LOOSE))[0] == 1, "of TP 2 there is one only"
    with pytest.raises(InvalidSpec, match="policy replicas: 1 replicas cannot serve 2 tiers apart"):
        registry.check(("replicas",), setting(STRICT, LOOSE, gpus=1))


def test_it_is_replicas_at_that_tp_under_its_own_name() -> None:
    s = setting(STRICT, LOOSE)
    lengths = {"arrivals": "poisson", "prompt": 1000, "output": 100}
    streams = [{"tier": t.name, "synthetic": lengths, "rate": 3} for t in (STRICT, LOOSE)]
    traffic = arrivals.build(workload.parse({"duration": "10s", "streams": streams}), lambda path: (), 1)
    results = compare.run(("replicas", "replicas-tp2"), s, traffic).results
    assert results["replicas"].policy == "replicas"
    assert results["replicas"].note.startswith("TP2, where one replica holds the targets of 2 of 2 tiers; a replica of another tier")
    figures = [metrics.policy_figures(s.pool, replace(results[n], note=""), {}) for n in ("replicas", "replicas-tp2")]
    assert figures[0] == figures[1]
