"""When the slow plane is asked, and what the fast one says between its answers."""

from dataclasses import fields, replace

import pytest

import nitsum.planner.capacity
import nitsum.planner.planes
from nitsum.demand import TierDemand
from nitsum.layout import Capacity, Group, Layout, Role, TierShare
from nitsum.perf.correction import Corrected, StepTiming
from nitsum.perf.profile import load_shipped
from nitsum.planner import NodeView, Plan, PlannerSettings, Snapshot, Verdict
from nitsum.planner.capacity import Mark
from nitsum.planner.compose import _digest
from nitsum.planner.planes import Planes
from nitsum.pool import Pool, Tier
from nitsum.residency import Residency
from nitsum.topology import Gpu, Node

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
TIERS = (Tier("chat", 500, 20, weight=4, default=True), Tier("agents", 1000, 40, weight=2), Tier("batch"))
POOL = Pool("default/chat", "u", "llama", TIERS, 8)
OTHER_GROUP = {
    "group_id": "x",
    "engine_id": "x",
    "pool": "x",
    "model": "x",
    "tp_size": 2,
    "gpu_uuids": ("x",),
    "role": Role.DECODE,
    "shares": (TierShare("x", 0.5),),
    "capacity": Capacity(max_queued=7),
}
NODE = NodeView(Node("a", tuple(Gpu(i, f"g{i}") for i in range(8)), legal_tp={"llama": (1, 2, 4, 8)}))


def taken(node: NodeView, at: float, pool: Pool = POOL, model: object = H100, **rates: float) -> Snapshot:
    demand = tuple(TierDemand(pool.name, t, r, 0.0, 1.0, 1000, 1.0, 200, 0.8, observed_at=at) for t, r in rates.items())
    return Snapshot((pool,), (node,), demand, {pool.name: model}, {pool.name: H100}, PlannerSettings(cooldown_s=5))  # type: ignore[dict-item]


def applied(plan: Plan, node: NodeView = NODE) -> NodeView:
    wanted = plan.node("a")
    assert wanted is not None
    return replace(node, residency=wanted.residency, layout=wanted.layout)


class Counted:
    """Both planes, with the calls of the slow one."""

    def __init__(self) -> None:
        self.planes, self.asked = Planes(), 0
        slow = self.planes._slow

        def counted(snapshot: Snapshot, now: float) -> Plan:
            self.asked += 1
            return slow(snapshot, now)

        self.planes._slow = counted  # type: ignore[assignment]

    def __call__(self, snapshot: Snapshot, now: float) -> tuple[Plan, int]:
        before = self.asked
        return self.planes(snapshot, now), self.asked - before


def test_the_slow_plane_is_asked_when_what_it_decides_by_changes() -> None:
    planes = Counted()
    first, asked = planes(taken(NODE, 0, chat=20, agents=20), 0)
    assert asked == 1
    node = applied(first)
    assert [planes(taken(node, t, chat=20, agents=20), t)[1] for t in (1, 2, 3)] == [1, 0, 0], "once more for what runs now"
    assert planes(taken(node, 4, chat=22, agents=20), 4)[1] == 0, "a little more demand"
    assert planes(taken(node, 4.5, chat=30, agents=20), 4.5)[1] == 1, "much more"
    assert planes(taken(node, 5, chat=30, agents=20), 5)[1] == 0
    assert planes(taken(node, 10, chat=30, agents=20), 10)[1] == 1, "its interval"
    assert planes(taken(replace(node, schedulable=False), 11, chat=30, agents=20), 11)[1] == 1
    assert planes(taken(node, 12, chat=30, agents=20), 12)[1] == 1, "and back"
    assert planes(taken(replace(node, leaving=True), 12.2, chat=30, agents=20), 12.2)[1] == 1, "to be drained"
    flipped = replace(node, last_flip_at=12.0)
    assert [planes(taken(flipped, t, chat=30, agents=20), t)[1] for t in (13, 14, 15, 16, 17.5)] == [1, 0, 0, 0, 1], "cooling, and cool"
    other = replace(POOL, budget_gpus=4)
    assert planes(taken(flipped, 18, other, chat=30, agents=20), 18)[1] == 1


def test_until_what_it_wanted_runs_it_is_asked_again() -> None:
    planes = Counted()
    planes(taken(NODE, 0, chat=20), 0)
    assert [planes(taken(NODE, t, chat=20), t)[1] for t in (1, 2)] == [1, 1], "nothing of it runs yet"


def test_until_its_roles_are_there_it_is_asked_again() -> None:
    tight = replace(POOL, tiers=(Tier("chat", 1000, 5.5, default=True),))
    planes = Counted()
    first, _ = planes(taken(NODE, 0, tight, chat=80), 0)
    node = applied(first)
    assert {g.role for g in node.layout.groups} == {Role.PREFILL, Role.DECODE}
    late = replace(node, layout=Layout(tuple(replace(g, role=Role.MIXED) for g in node.layout.groups)))
    assert [planes(taken(at, t, tight, chat=80), t)[1] for at, t in ((late, 1), (late, 2), (node, 3), (node, 4))] == [1, 1, 1, 0]


def test_an_engine_that_has_failed_stays_wanted_between_its_answers() -> None:
    planes = Counted()
    first, _ = planes(taken(NODE, 0, chat=20), 0)
    node = applied(first)
    planes(taken(node, 1, chat=20), 1)
    broken = replace(node, residency=Residency(node.residency.engines[1:]))
    plan, asked = planes(taken(broken, 2, chat=20), 2)
    assert asked == 0
    assert applied(plan).residency == node.residency


def test_labels_follow_demand_between_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = replace(POOL, allowed_tp=(1,))
    planes = Counted()
    first, _ = planes(taken(NODE, 0, pool, chat=20, agents=20), 0)
    node = applied(first)
    planes(taken(node, 1, pool, chat=20, agents=20), 1)
    plan, asked = planes(taken(node, 2, pool, chat=20, agents=20, batch=1), 2)
    assert asked == 1
    planes.planes.interval_s = 1e9
    monkeypatch.setattr(nitsum.planner.planes, "MOVED", 1e9)
    again, asked = planes(taken(node, 3, pool, chat=4, agents=250, batch=1), 3)
    assert asked == 0

    def of(p: Plan, tier: str) -> int:
        return sum(s.tier == tier and s.share > 0.01 for g in p.nodes[0].layout.groups for s in g.shares)

    assert (of(again, "agents"), of(again, "chat")) != (of(first, "agents"), of(first, "chat"))
    assert {g.group_id for g in again.nodes[0].layout.groups} == {g.group_id for g in node.layout.groups}, "nothing restarts"
    why = again.pool(pool.name)
    assert why is not None
    assert why.verdict is Verdict.KEEP
    assert why.reasons == plan.pools[0].reasons, "why the layout is as it is, the slow plane said"


def test_without_fresh_reports_nothing_changes_and_it_says_so() -> None:
    planes = Counted()
    first, _ = planes(taken(NODE, 0, chat=20, agents=20), 0)
    node = applied(first)
    late = [planes(replace(taken(node, 0, chat=1, agents=60)), 40.0 + t)[0] for t in range(3)]
    for plan in late:
        assert plan.nodes[0].layout == node.layout
        assert plan.pools[0].held == "no fresh demand report: the last safe layout stays"
    assert planes.asked == 2, "once to see it"
    assert planes(taken(node, 43.0, chat=20, agents=20), 43.0)[0].pools[0].held == ""


def test_what_would_help_is_said_of_tiers_that_are_short() -> None:
    planes = Counted()
    plan, _ = planes(taken(NODE, 0, chat=500, agents=20), 0)
    assert [t.tier for t in plan.pools[0].tiers if not t.feasible]
    assert "GPUs in all would hold" in plan.pools[0].remedies[0]
    strict = replace(POOL, tiers=(Tier("chat", 500, 1.0),))
    assert "can be held" in planes(taken(NODE, 1, strict, chat=20), 1)[0].pools[0].remedies[0]
    assert not planes(taken(NODE, 2, chat=2), 2)[0].pools[0].remedies


def test_a_corrected_profile_is_another_one() -> None:
    planes = Counted()
    model = Corrected(H100)
    first, _ = planes(taken(NODE, 0, model=model.fixed(0), chat=400), 0)
    node = applied(first)
    before = first.pools[0].tiers[0].safe_rate
    for i in range(200):
        batch = 1 + i % 32
        model.observe(StepTiming(1, 0, batch, 1000, 2 * H100.decode_ms(1, batch, 1000)))
    plan, asked = planes(taken(node, 1, model=model.fixed(1), chat=400), 1)
    assert asked == 1
    assert plan.pools[0].tiers[0].safe_rate < before
    assert "corrected by 200 timings" in plan.pools[0].reasons[0]


@pytest.mark.parametrize(("chat", "agents"), [(20.0, 2.0), (2.0, 40.0)])
def test_groups_of_a_tier_with_tpot_get_a_prefill_budget(chat: float, agents: float) -> None:
    plan = Planes()(taken(NODE, 0, chat=chat, agents=agents), 0)
    tpot_ms = {t.name: t.tpot_ms for t in TIERS}
    for g in plan.nodes[0].layout.groups:
        strictest = min((ms for s in g.shares if s.share > 0.01 and (ms := tpot_ms[s.tier]) is not None), default=None)
        assert strictest is not None
        budget, batch = g.capacity.prefill_tokens_per_step, g.capacity.max_running
        assert budget >= 64
        kept_up = budget / H100.mixed_ms(g.tp_size, budget, batch, 1100) * 1e3 < 2.5 * g.capacity.prefill_tokens_per_s
        assert kept_up or H100.mixed_ms(g.tp_size, budget, batch, 1100) <= 1.02 * strictest


def test_a_group_that_takes_a_tier_in_looks_no_worse_for_it() -> None:
    """`strict` can be held at no TP, so one group of the others takes it in; that must not make another layout look better."""
    tiers = (Tier("strict", 500, 1.0), Tier("agents", 1000, 40))
    planes, pool = Planes(), replace(POOL, tiers=tiers)
    node = NODE
    for t in (0.0, 10.0, 20.0):
        plan = planes(taken(node, t, pool, strict=0.5, agents=400), t)
        node = applied(plan)
    served = [{s.tier: s.share for s in g.shares} for g in node.layout.groups]
    assert sum("strict" in s for s in served) == 1, served
    assert "gains 0%" in plan.pools[0].reasons[-1]
    assert not plan.pools[0].rejected


def test_a_plan_id_tells_every_field_of_what_is_wanted_apart() -> None:
    wanted = Planes()(taken(NODE, 0, chat=20, agents=20), 0).nodes[0]
    group, engine = wanted.layout.groups[0], wanted.residency.engines[0]
    assert {f.name for f in fields(Group)} == set(OTHER_GROUP), "a new field of Group belongs in the digest"
    seen = {_digest([wanted])}
    others = [replace(wanted, agent_id="b"), replace(wanted, layout=Layout((group,)))]
    for name, value in OTHER_GROUP.items():
        more: dict[str, object] = {"gpu_uuids": ("x", "y")} if name == "tp_size" else {}
        others.append(replace(wanted, layout=Layout((replace(group, **{name: value} | more),))))  # type: ignore[arg-type]
    engines: list[dict[str, object]] = [{"engine_id": "x"}, {"model": "x"}, {"tp_size": 2, "gpu_uuids": ("x", "y")}, {"gpu_uuids": ("x",)}]
    others += [replace(wanted, residency=Residency((replace(engine, **e),))) for e in engines]  # type: ignore[arg-type]
    for other in others:
        seen.add(_digest([other]))
    assert len(seen) == len(others) + 1


def test_marks_are_forgotten_beyond_a_bound_and_no_number_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nitsum.planner.capacity, "REMEMBERED_MAX", 8)
    known = nitsum.planner.capacity.Capacity()
    marks = [Mark(1.05**i, 1.0, 1.0, 1.0, 1.0) for i in range(50)]
    numbers = [known.number(m) for m in marks]
    assert [known.number(m) for m in marks[-8:]] == numbers[-8:]
    assert len({*numbers, *(known.number(m) for m in marks[:8])}) == len(marks) + 8, "an old key must not come to mean other lengths"
    assert len(known._numbers) == 8
