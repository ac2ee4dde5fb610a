"""Roles in the simulated fleet: what the planner promises of split blocks is held, and where they win, they do."""

from dataclasses import dataclass, replace

import pytest

from nitsum.layout import FlipMode, Layout, Role
from nitsum.perf.profile import load_shipped
from nitsum.planner import Plan, Snapshot
from nitsum.planner.capacity import Capacity, mark
from nitsum.planner.offer import Asked, kinds
from nitsum.planner.planes import Planes
from nitsum.planner.split import Split
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.sim import arrivals, compare, hardware, workload
from nitsum.sim.arrivals import Traffic
from nitsum.sim.demand import Foresight
from nitsum.sim.fleet import Fleet
from nitsum.sim.metrics import policy_figures
from nitsum.sim.policies import Policy, governed, registry
from nitsum.sim.policies.layouts import Part, partition
from nitsum.sim.policies.registry import Setting
from nitsum.sim.policies.standing import Standing
from nitsum.sim.result import RunResult

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")


def setting(*tiers: Tier, gpus: int = 8) -> Setting:
    nodes = hardware.fleet(f"{gpus // 8}x8:h100_sxm", H100.model, H100.tp_sizes)
    return Setting(Pool("default/p", "u", H100.model, tiers, gpus), nodes, H100, H100)


def traffic(rates: dict[str, float], prompt: int, output: int, duration: str = "60s", seed: int = 1) -> Traffic:
    lengths = {"arrivals": "poisson", "prompt": {"mean": prompt, "cv": 0.96}, "output": {"mean": output, "cv": 0.78}}
    streams = [{"tier": t, "synthetic": lengths, "rate": r} for t, r in rates.items()]
    return arrivals.build(workload.parse({"duration": duration, "streams": streams}), lambda path: (), seed)


def goodput(s: Setting, result: RunResult) -> float:
    return float(policy_figures(s.pool, result, {})["goodput_rps"])


@dataclass(frozen=True)
class NoStore:
    """Implements FlipCost: the same flips, but KV cannot be handed over."""

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        return H100.pause_ms(resident_tokens, mode, from_tp, to_tp)


def test_roles_win_where_tpot_is_tight_and_prompts_are_long() -> None:
    s, t = setting(Tier("chat", 1000, 7, default=True)), traffic({"chat": 55}, 2500, 212)
    found = []
    for cost in (NoStore(), H100):
        seen: set[Role] = set()

        class Seeing(Planes):
            def __call__(self, snapshot: Snapshot, now: float, seen: set[Role] = seen) -> Plan:
                plan = super().__call__(snapshot, now)
                seen |= {g.role for n in plan.nodes for g in n.layout.groups}
                return plan

        policy = registry.build("nitsum", replace(s, flip_cost=cost, planner=Seeing))
        found.append(goodput(s, Fleet(policy, s.nodes, s.model, t).run()))
        assert (Role.DECODE in seen) is (cost is H100)
    without, with_roles = found
    assert with_roles > 1.15 * without, found


@pytest.mark.parametrize(
    ("tier", "prompt", "output", "split"),
    [
        (Tier("chat", 1000, 7), 2500, 212, Split(4, 1, 1, 4)),
        (Tier("chat", 500, 10), 1187, 212, Split(4, 1, 2, 2)),
        (Tier("chat", 500, 7), 300, 300, Split(4, 1, 4, 1)),
        (Tier("chat", 2000, 20), 8000, 300, Split(2, 2, 2, 2)),
        (Tier("chat", 1000, 30), 3000, 60, Split(6, 1, 2, 1)),
    ],
    ids=str,
)
def test_what_a_block_is_said_to_take_it_takes(tier: Tier, prompt: int, output: int, split: Split) -> None:
    """At the rate that the planner calls safe, as many requests meet both targets as the tier asks."""
    s = setting(tier)
    (seen,) = Foresight(s.pool.name, ("chat",), traffic({"chat": 20}, prompt, output))(0.0, 60.0)
    a = Asked(s.pool.name, (tier,), {"chat": mark(seen)}, {"chat": seen.rate}, s.resident_tp, 8, 8, H100, H100)
    (kind,) = kinds(a, Capacity(governed=True), None, {split})
    widths = {split.prefill_tp: 0, split.decode_tp: 0}
    for _, tp in split.parts():
        widths[tp] += 1
    layouts = partition(s.pool, s.nodes, [Part(tp, n, ("chat",)) for tp, n in widths.items()])
    assert layouts is not None
    first = {
        agent_id: Layout(tuple(replace(g, role=role) for g, (role, _) in zip(layout.groups, split.parts(), strict=True)))
        for agent_id, layout in layouts.items()
    }
    pool = replace(s.pool, mode=AdaptationMode.FROZEN)
    policy = Policy("standing", pool, H100, s.resident_tp, Standing, first, limits=governed, kv_load=H100)
    result = Fleet(policy, s.nodes, H100, traffic({"chat": kind.rate("chat")}, prompt, output, seed=3)).run()
    assert policy_figures(pool, result, {})["attainment"] >= tier.target


def test_where_mixed_groups_have_room_nothing_is_handed_over() -> None:
    s = setting(Tier("chat", 500, 20, default=True), Tier("agents", 2000, 40))
    fleet = Fleet(registry.build("nitsum", s), s.nodes, s.model, traffic({"chat": 20, "agents": 20}, 1000, 200, "20s"))
    fleet.run()
    assert {g.group.role for n in fleet.nodes.values() for g in n.groups.values()} == {Role.MIXED}


def test_background_is_served_beside_roles_and_takes_nothing_from_them() -> None:
    tiers = Tier("chat", 1000, 7, default=True), Tier("night")
    t = {"chat": 45.0}
    alone, beside = (
        compare.run(("nitsum",), setting(*tiers), traffic(rates, 2500, 212)).figures()["nitsum"]["tiers"]["chat"]
        for rates in (t, t | {"night": 10.0})
    )
    assert beside["goodput_rps"] > 0.9 * alone["goodput_rps"]


def test_traffic_without_targets_has_a_partition_and_an_oracle() -> None:
    s, t = setting(Tier("chat", 1000, 7, default=True), Tier("night")), traffic({"night": 5.0}, 1000, 100, "5s")
    found = compare.run(("static-partition", "oracle", "static-pd"), s, t).figures()
    assert list(found) == ["static-partition", "oracle", "static-pd"]
    assert all(f["tiers"]["night"]["tpot_ms"]["p99"] > 0 for f in found.values()), "and is served"
