"""The whole: production router, ledger and planner around simulated engines. Nothing lost, nothing twice, whatever flips."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.errors import InvalidSpec
from nitsum.layout import FlipMode, Layout, Role
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodePlan, Plan, Snapshot
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.residency import Residency
from nitsum.sim import arrivals, compare, hardware, metrics, workload
from nitsum.sim.arrivals import Traffic
from nitsum.sim.engine import EngineLimits
from nitsum.sim.fleet import Fleet
from nitsum.sim.group import Live, SimGroup
from nitsum.sim.policies import Policy, governed, registry
from nitsum.sim.policies.disaggregated import split
from nitsum.sim.policies.layouts import Part, partition, uniform
from nitsum.sim.policies.registry import FixedPause, Setting
from nitsum.sim.policies.standing import Standing
from nitsum.sim.request import Request
from nitsum.sim.result import Ending, Outcome, RunResult

from .h100 import PROFILE

TIERS = (Tier("strict", 1000, 12, weight=2), Tier("loose", 3000, 60, default=True), Tier("batch"))


def setting(gpus: int = 8, nodes: int = 1) -> Setting:
    pool = Pool("default/p", "u", "llama-8b", TIERS, gpus)
    return Setting(pool, hardware.fleet(f"{nodes}x8:h100_sxm", "llama-8b", PROFILE.tp_sizes), PROFILE, PROFILE)


def traffic(rates: dict[str, float], duration: str = "30s", seed: int = 1, prompt: int = 1500, output: int = 150) -> Traffic:
    lengths = {"arrivals": {"gamma": {"cv": 1.5}}, "prompt": {"mean": prompt, "cv": 0.8}, "output": {"mean": output, "cv": 0.8}}
    streams = [{"tier": t, "synthetic": lengths, "rate": r} for t, r in rates.items()]
    return arrivals.build(workload.parse({"duration": duration, "streams": streams}), lambda path: (), seed)


class Restless:
    """A planner that changes its mind at each of its first ten calls, in every mode: what a fleet must survive."""

    def __init__(self, s: Setting, shapes: list[tuple[int, FlipMode, int]]) -> None:
        """(TP, mode, prefill groups of each node; 0: all mixed). Where only the last differs, roles change and nothing flips."""
        self.s, self.shapes, self.calls, self.standing = s, shapes, 0, Standing()

    def __call__(self, snapshot: Snapshot, now: float) -> Plan:
        tp, mode, prefill = self.shapes[min(self.calls, 10) % len(self.shapes)]
        self.calls += 1
        layouts = uniform(self.s.pool, self.s.nodes, tp, "test")
        if prefill:
            layouts = split(layouts, prefill)
        served = self.standing(replace(snapshot, nodes=tuple(replace(n, layout=layouts[n.node.agent_id]) for n in snapshot.nodes)), now)
        return Plan(str(self.calls), tuple(replace(n, mode=mode) for n in served.nodes), ())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from(list(FlipMode)), st.integers(0, 3)), min_size=2, max_size=5),
    st.floats(0, 3000),
    st.integers(0, 99),
    st.sampled_from([0.3, 1.5]),
    st.integers(1, 3),
)
def test_no_request_lost_or_finished_twice_whatever_flips(
    shapes: list[tuple[int, FlipMode, int]], pause_ms: float, seed: int, interval_s: float, gateways: int
) -> None:
    s = setting(16, 2)
    made = lambda: Restless(s, shapes)  # noqa: E731
    policy = Policy("restless", s.pool, FixedPause(pause_ms), s.tps, made, None, s.settings, interval_s, kv_load=PROFILE)
    t = traffic({"strict": 8, "loose": 8, "batch": 2}, "5s", seed)
    result = Fleet(policy, s.nodes, PROFILE, t, gateways).run()  # asserts GPUs, budget, tokens and endings as it goes
    assert len(result.outcomes) == len(t.requests)
    assert all(o.ending is not Ending.FAILED for o in result.outcomes)
    assert result.gpus_max <= 16
    assert all(sum(n for _, _, n in at.gpus) <= 16 for at in result.layouts)


def pd(s: Setting, tp: int = 1, prefill: int = 4) -> Policy:
    pool = replace(s.pool, mode=AdaptationMode.FROZEN, allowed_tp=(tp,))
    first = split(uniform(s.pool, s.nodes, tp, "test"), prefill)
    return Policy("pd", pool, FixedPause(0), (tp,), Standing, first, s.settings, kv_load=PROFILE)


def test_a_hand_over_costs_the_load_of_the_kv_and_no_second_prefill() -> None:
    s = setting()
    r = Request(0, "loose", 0.0, 20_000, 400, 512)
    t = Traffic(1.0, (r,), {}, ())
    mixed = Fleet(registry.build("aware-tp1", s), s.nodes, PROFILE, t).run().outcomes[0]
    apart = Fleet(pd(s), s.nodes, PROFILE, t).run().outcomes[0]
    again = Fleet(replace(pd(s), kv_load=None), s.nodes, PROFILE, t).run().outcomes[0]
    assert mixed.ttft_ms == apart.ttft_ms == again.ttft_ms
    assert mixed.tpot_ms is not None
    assert apart.tpot_ms is not None
    assert again.tpot_ms is not None
    load_ms = PROFILE.load_ms(20_001, 1)
    assert load_ms is not None
    assert load_ms > 5
    # One token of prefill on the other side, a decode step less.
    assert (apart.tpot_ms - mixed.tpot_ms) * 399 == pytest.approx(load_ms, abs=10)
    assert (again.tpot_ms - mixed.tpot_ms) * 399 > 400


def test_prefill_groups_never_decode_and_decode_groups_take_no_new_request() -> None:
    s = setting()

    class Watched(Fleet):
        def _start(self, g: SimGroup, live: Live) -> None:
            assert (live.made > 0) is (g.group.role is Role.DECODE), (g.group.role, live.made)
            super()._start(g, live)

        def _advance(self, g: SimGroup, when: float) -> None:
            if g.group.role is Role.PREFILL:
                assert not g.engine.running
            super()._advance(g, when)

    result = Watched(pd(s, 2, 1), s.nodes, PROFILE, traffic({"strict": 4, "loose": 6}, "20s")).run()
    assert all(o.ending is Ending.FINISHED for o in result.outcomes)


def test_nothing_is_prefilled_for_which_decode_has_no_room() -> None:
    """Overload waits and is shed in front of prefill: what was let in keeps its TPOT."""
    s = setting()
    t = traffic({"loose": 400}, "20s", prompt=500, output=600)
    result = Fleet(registry.with_engines(pd(s, 1, 5)), s.nodes, PROFILE, t).run()
    endings = [o.ending for o in result.outcomes]
    assert endings.count(Ending.REFUSED) > 0.2 * len(endings)
    assert Ending.FAILED not in endings
    tpot = sorted(o.tpot_ms for o in result.outcomes if o.tpot_ms is not None)
    assert tpot[int(len(tpot) * 0.95)] < 60


def test_the_best_ratio_is_searched() -> None:
    s = setting()
    found = compare.run(("static-pd",), s, traffic({"strict": 5, "loose": 5}, "10s"))
    f = found.figures()["static-pd"]
    assert f["attainment"] > 0.9
    assert "prefill and" in f["note"]
    with pytest.raises(InvalidSpec, match="no node has room"):
        compare.run(("static-pd",), setting(gpus=1), traffic({"loose": 1}, "2s"))


def test_two_engines_on_one_gpu_are_caught() -> None:
    s = setting()
    layouts = uniform(s.pool, s.nodes, 8, "test")
    fleet = Fleet(replace(registry.build("plain-tp1", s)), s.nodes, PROFILE, traffic({"loose": 1}, "1s"))
    fleet._begin()
    with pytest.raises(AssertionError, match="two engines awake"):
        fleet.agents.wake(fleet.nodes["node-00000"], layouts["node-00000"].groups[0])


def test_a_budget_that_a_planner_exceeds_is_caught() -> None:
    s = setting(gpus=4)
    beyond = uniform(replace(s.pool, budget_gpus=8), s.nodes, 1, "test")
    plan = lambda snapshot, now: Plan("x", tuple(NodePlan(a, Residency(), la) for a, la in beyond.items()), ())  # noqa: E731
    policy = Policy("greedy", s.pool, FixedPause(0), (1,), lambda: plan)
    with pytest.raises(AssertionError, match="the budget is 4"):
        Fleet(policy, s.nodes, PROFILE, traffic({"loose": 1}, "1s")).run()


def test_a_flip_costs_its_pause_and_the_prefill_unless_kv_is_kept() -> None:
    s = setting()
    r = Request(0, "loose", 0.9, 20_000, 1000, 1024)
    t = Traffic(3.0, (r,), {}, ())

    def end(mode: FlipMode, pause_ms: float, let_finish_s: float = 0.0) -> float:
        def plan(snapshot: Snapshot, now: float) -> Plan:
            layouts = uniform(s.pool, s.nodes, 8 if now < 2 else 4, "test")
            return Plan("p", tuple(NodePlan(a, Residency(), la, mode, let_finish_s) for a, la in layouts.items()), ())

        result = Fleet(Policy("one", s.pool, FixedPause(pause_ms), s.tps, lambda: plan), s.nodes, PROFILE, t).run()
        assert result.flips == 1
        o = result.outcomes[0]
        assert o.ending is Ending.FINISHED
        assert o.tpot_ms is not None
        return o.tpot_ms * 999

    kept, recomputed = end(FlipMode.MIGRATE_FIRST, 200), end(FlipMode.ABORT, 200)
    assert end(FlipMode.MIGRATE_FIRST, 1200) - kept == pytest.approx(1000, abs=1)
    prefill = PROFILE.prefill_ms(4, 8192) + PROFILE.prefill_ms(4, 8192, 8192) + PROFILE.prefill_ms(4, 4000, 16384)
    assert recomputed - kept == pytest.approx(prefill, rel=0.1)
    ended, waited = end(FlipMode.LET_FINISH, 200, math.inf), end(FlipMode.LET_FINISH, 200, 1.0)
    assert ended < kept  # it ends where it runs
    assert ended < waited < recomputed  # not for longer than a second; then as if aborted
    assert end(FlipMode.LET_FINISH, 200, 0.0) == recomputed


def test_plain_never_refuses_and_drowns_while_static_sheds() -> None:
    s = setting()
    t = traffic({"strict": 120, "loose": 120}, "20s", prompt=3000, output=300)
    done = compare.run(("plain-tp1", "static-tp1"), s, t)
    plain, static = (metrics.policy_figures(s.pool, done.results[n], {}) for n in ("plain-tp1", "static-tp1"))
    assert plain["refused"] == 0
    assert static["refused"] > 0
    assert static["tiers"]["loose"]["ttft_ms"]["p50"] < plain["tiers"]["loose"]["ttft_ms"]["p50"] / 2


def test_every_policy_runs_and_figures_are_the_same_bytes_for_the_same_seed() -> None:
    s = setting()
    s = replace(s, pool=replace(s.pool, checkpoint="c0ffee"))  # engines of the pool's own checkpoint, or planners take none for theirs
    t = traffic({"strict": 6, "loose": 10, "batch": 1}, "8s")
    names = registry.expand(
        "plain-tp2,aware-tp2,apart,static-tpN,static-partition,static-pd,resplit-tp2,replicas,replicas-tp2,restart-tp,nitsum,nitsum@copy,nitsum@2s,oracle",
        s,
    )
    first = json.dumps(compare.run(names, s, t).figures())
    assert json.dumps(compare.run(names, s, t).figures()) == first
    figures = json.loads(first)
    assert set(figures) == set(names)
    for f in figures.values():
        assert f["gpus_max"] <= 8
        assert f["failed"] == 0
        assert f["tiers"]["batch"]["attainment"] is None
    assert {json.dumps(f["offered_rps"]) for f in figures.values()} == {json.dumps(figures["nitsum"]["offered_rps"])}


def test_the_governor_keeps_tpot_where_stock_prefill_stalls_decode() -> None:
    s = setting(gpus=1)
    t = traffic({"strict": 2.0}, "40s", prompt=4000, output=150)
    stock = registry.build("plain-tp1", s)
    sized = replace(stock, limits=lambda group: EngineLimits(mixed_tokens=192))
    worst = [
        metrics.policy_figures(s.pool, Fleet(p, s.nodes, PROFILE, t).run(), {})["tiers"]["strict"]["tpot_ms"]["p99"] for p in (stock, sized)
    ]
    assert worst[1] < worst[0]


def test_engines_run_with_the_prefill_budget_that_the_plan_gives() -> None:
    s = setting()
    fleet = Fleet(registry.build("nitsum", s), s.nodes, PROFILE, traffic({"strict": 8, "loose": 8}, "5s"))
    fleet.run()
    groups = [g for n in fleet.nodes.values() for g in n.groups.values()]
    assert groups
    for g in groups:
        assert g.engine.limits == governed(g.group)
        assert g.engine.limits.mixed_tokens == g.group.capacity.prefill_tokens_per_step > 0


def test_partitions_pack_widest_first_within_the_budget() -> None:
    s = setting()
    found = partition(s.pool, s.nodes, (Part(1, 4, ("loose",)), Part(4, 1, ("strict",))))
    assert found is not None
    groups = found["node-00000"].groups
    assert sorted(g.tp_size for g in groups) == [1, 1, 1, 1, 4]
    assert isinstance(found["node-00000"], Layout)
    assert partition(s.pool, s.nodes, (Part(8, 1, ("loose",)), Part(1, 1, ("strict",)))) is None


def outcome(tier: str, ttft: float | None, tpot: float | None, ending: Ending = Ending.FINISHED) -> Outcome:
    return Outcome(tier, 0.0, ending, ttft, tpot)


def test_figures_follow_the_definitions() -> None:
    outcomes = (
        outcome("strict", 1000, 12),  # met: targets are inclusive
        outcome("strict", 900, None),  # one token: no TPOT to miss
        outcome("strict", 1001, 5),
        outcome("strict", 10, 12.1),
        outcome("strict", None, None, Ending.REFUSED),
        outcome("strict", 10, None, Ending.FAILED),
        outcome("batch", 9e9, 9e9),
    )
    f = metrics.policy_figures(setting().pool, RunResult("x", 10.0, outcomes, (), 3, 8, 0, 12.0), {"loose": 4})
    assert (f["goodput_rps"], f["attainment"], f["offered_rps"]) == (0.2, round(2 / 6, 6), 0.6)
    assert (f["refused"], f["failed"], f["too_long"], f["flips"], f["gpus_max"]) == (1, 1, 4, 3, 8)
    strict, loose, batch = (f["tiers"][t] for t in ("strict", "loose", "batch"))
    assert strict["goodput_rps"] == 0.2
    assert strict["ttft_ms"] == {"p50": 900, "p99": 1001}
    assert strict["tpot_ms"] == {"p50": 12, "p99": 12.1}
    assert (loose["goodput_rps"], loose["attainment"], loose["ttft_ms"]) == (None, None, {"p50": None, "p99": None})
    assert (batch["goodput_rps"], batch["attainment"]) == (None, None)


def test_the_shipped_profile_runs() -> None:
    profile = load_shipped("tiny-llama.slot")
    pool = Pool("default/t", "u", "tiny-llama", (Tier("interactive", 2000, 80), Tier("agents", 9000, 200)), 2)
    s = Setting(pool, hardware.fleet("1x2:slot", "tiny-llama", profile.tp_sizes), profile, profile)
    t = traffic({"interactive": 0.3, "agents": 0.5}, "60s", prompt=200, output=40)
    f = compare.run(("nitsum", "plain-tp1"), s, t).figures()
    assert f["nitsum"]["attainment"] > 0.5


def test_the_oracle_is_never_below_nitsum() -> None:
    s = setting()
    t = traffic({"strict": 40, "loose": 60}, "10s")
    done = compare.run(("nitsum", "oracle"), s, t)
    assert metrics.met_all(s.pool, done.results["oracle"]) >= metrics.met_all(s.pool, done.results["nitsum"])
    assert "best of 5 in hindsight" in done.results["oracle"].note
