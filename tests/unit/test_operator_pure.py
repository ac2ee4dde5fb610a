"""The operator's pure parts: which spec is in force, when a directive differs, who gets which term."""

import json
import math
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

import nitsum_operator
from nitsum.errors import InvalidSpec
from nitsum.layout import Capacity, Group, Layout, Role, TierShare
from nitsum.length_sketch import GAMMA
from nitsum.perf.profile import shipped
from nitsum.planner.planes import Planes
from nitsum.planner.types import NodePlan, Plan, PlannerSettings, PoolPlan, TierOutlook, Verdict
from nitsum.residency import Residency, ResidentEngine
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import PoolCondition, Reason
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.issue import issue, new_ca
from nitsum_api.resources import PoolStatus
from nitsum_api.security import Identity
from nitsum_api.types.v1 import types_pb2
from nitsum_operator import settings
from nitsum_operator.accept import Judgement, judge
from nitsum_operator.drift import REFRESH_S, drifted
from nitsum_operator.execute import Executor, digest, directive, group_proto, named
from nitsum_operator.figures import Figures
from nitsum_operator.fleet import Fleet
from nitsum_operator.handlers import DRAIN, OUT_OF_SERVICE, Store
from nitsum_operator.history import History
from nitsum_operator.issuer import due, gateway_names
from nitsum_operator.leader import next_term
from nitsum_operator.links import Endpoint, Link, Links, endpoints
from nitsum_operator.nodes import node_status
from nitsum_operator.observe import Agent, group_from, windows
from nitsum_operator.plan import decide, snapshot
from nitsum_operator.reconcile import Reconciler
from nitsum_operator.remember import lost_agent, spec_in_force
from nitsum_operator.routes import routes
from nitsum_operator.standing import Standing
from nitsum_operator.status import Seen, pool_status, without_figures
from nitsum_operator.write import merge_patch

ROOT = Path(__file__).parents[2]


def pool(name: str, created: str, generation: int = 1, **spec: Any) -> dict[str, Any]:
    body = {
        "model": {"name": "tiny-llama", "source": {"path": "/m"}},
        "budget": {"gpus": 2},
        "tiers": [{"name": "t", "ttft": "1s"}],
    }
    meta = {"namespace": "a", "name": name, "uid": name, "creationTimestamp": created, "generation": generation}
    return {"metadata": meta, "spec": {**body, **spec}}


def judged(pools: list[dict[str, Any]], **other: Any) -> dict[str, Judgement]:
    named = {f"a/{p['metadata']['name']}": p for p in pools}
    return judge(named, other.get("facts", {}), ("slot",), {}, other.get("rejected", {}), other.get("before", {}))


def test_older_pool_keeps_the_model_name() -> None:
    result = judged([pool("a-young", "2026-02-01T00:00:00Z"), pool("z-old", "2026-01-01T00:00:00Z")])
    assert result["a/z-old"].status == "True"
    assert (result["a/a-young"].reason, result["a/a-young"].accepted) == ("ModelNameTaken", None)


def test_last_accepted_spec_stays_in_force() -> None:
    first = judged([pool("p", "2026-01-01T00:00:00Z")])
    before = {"a/p": first["a/p"].accepted}
    facts = {"tiny-llama": [agent_pb2.ModelFacts(model="tiny-llama", legal_tp=[1, 2])]}
    wrong = pool("p", "2026-01-01T00:00:00Z", 2, tensorParallel={"allowed": [1, 4]}, budget={"gpus": 4})
    second = judged([wrong], before=before, facts=facts)["a/p"]
    assert (second.status, second.reason) == ("False", "IllegalTensorParallel")
    assert second.accepted == first["a/p"].accepted


def test_what_an_agent_refused_is_not_kept() -> None:
    first = judged([pool("p", "2026-01-01T00:00:00Z")])
    second = judged([pool("p", "2026-01-01T00:00:00Z")], before={"a/p": first["a/p"].accepted}, rejected={("a/p", 1): "TP 2 is illegal"})
    assert second["a/p"].reason == "IllegalTensorParallel"
    assert second["a/p"].accepted is None


def test_profile_not_found_names_the_gpu() -> None:
    spec = {"model": {"name": "unheard-of", "source": {"path": "/m"}}}
    result = judged([pool("p", "2026-01-01T00:00:00Z", **spec)])["a/p"]
    assert result.reason == "UnknownProfile"
    assert "slot" in result.message
    named = judged([pool("p", "2026-01-01T00:00:00Z", profile="unheard-of")])["a/p"]
    assert named.reason == "UnknownProfile"
    assert all(name in message for name in shipped() for message in (result.message, named.message)), "both list those there are"


def node(capacity: int, gpu: str = "g0") -> NodePlan:
    engine = ResidentEngine("e", "tiny-llama", 1, (gpu,))
    group = Group("e", "e", "a/p", "tiny-llama", 1, (gpu,), shares=(TierShare("t", 1.0),), capacity=Capacity(capacity))
    return NodePlan("n", Residency((engine,)), Layout((group,)))


def test_digest_ignores_capacity_and_sees_placement_and_tiers() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    stricter = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z", 2, tiers=[{"name": "t", "ttft": "2s"}])])["a/p"].accepted}
    assert digest(node(1), accepted) == digest(node(9), accepted)
    assert digest(node(1), accepted) != digest(node(1, "g1"), accepted)
    assert digest(node(1), accepted) != digest(node(1), stricter)


def test_directive_is_whole() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    d = directive(node(3), accepted, generation=5, term=2, now=100.0)
    assert d.operation_id.endswith(".5")
    assert (d.term, d.deadline.seconds, d.layout[0].capacity.max_running) == (2, 220, 3)
    assert [(p.pool.name, p.model.source.path, p.tiers[0].ttft_ms) for p in d.pools] == [("a/p", "/m", 1000.0)]


def test_limits_come_back_from_a_report_as_they_were_sent() -> None:
    limits = Capacity(1, 2, 3.0, 4, 5)
    sent = replace(node(3).layout.groups[0], capacity=limits)
    assert group_from(group_proto(sent, "u")).capacity == limits


def test_terms_and_certificates() -> None:
    assert next_term(3, 9) == 10
    now = datetime.now(UTC)
    leaf = issue(new_ca(now), Identity("agent", "x"), now=now, hours=30)["tls.crt"]
    assert not due(leaf, now + timedelta(hours=19))
    assert due(leaf, now + timedelta(hours=21))
    assert due(b"", now)


def test_the_gateways_certificate_has_every_name_of_its_service() -> None:
    leaf = issue(new_ca(), Identity("gateway", "gateway"), gateway_names("ns"))
    found = x509.load_pem_x509_certificate(leaf["tls.crt"]).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    names = found.value.get_values_for_type(x509.DNSName)
    for end in ("", ".ns", ".ns.svc", ".ns.svc.cluster.local"):
        assert f"nitsum-gateway{end}" in names, "clients write any of them"


async def test_an_address_may_come_to_be_another_pods(tmp_path: Path) -> None:
    for name, data in issue(new_ca(), Identity("operator", "x"), ("localhost",)).items():
        (tmp_path / name).write_bytes(data)
    found = Links()
    old = Endpoint("127.0.0.1:1", "n1", pod="agent-1", terminating=True)
    await found.update("agent", (old,), tmp_path)
    new = Endpoint("127.0.0.1:1", "n1", pod="agent-2")
    await found.update("agent", (new,), tmp_path)
    assert [k.endpoint for k in found.agents.values()] == [new]
    await found.close()


def test_endpoints_sorted_once_with_node_port() -> None:
    ports = [SimpleNamespace(name="agent", port=1), SimpleNamespace(name="node", port=2)]
    one = SimpleNamespace(ports=ports, endpoints=[SimpleNamespace(addresses=["10.0.0.9"], node_name="n", target_ref=None, conditions=None)])
    assert endpoints([one, one], "agent") == (Endpoint("10.0.0.9:1", "n", "10.0.0.9:2"),)
    assert endpoints([one], "gateway") == ()


def test_settings_name_the_wrong_key() -> None:
    assert settings.parse({"planner": {"cooldownSeconds": 2}}).planner.cooldown_s == 2.0
    with pytest.raises(InvalidSpec, match=r"planner\.cooldown"):
        settings.parse({"planner": {"cooldown": 2}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in ("dwellSeconds", "staleAfterSeconds", "headroomQuantile", "flipsAtOnceMax")),
        *(("headroomQuantile", value) for value in (1, 1.5)),
        *(("flipsAtOnceMax", value) for value in (0.5, 1.5)),
        ("gainMin", -1),
        ("cooldownSeconds", float("nan")),
        ("dwellSeconds", float("inf")),
    ],
)
def test_settings_refuse_what_no_plan_can_be_made_with(key: str, value: float) -> None:
    """As the chart does, whose schema a file written by hand does not pass."""
    with pytest.raises(InvalidSpec, match=rf"planner\.{key}"):
        settings.parse({"planner": {key: value}})


def test_sketches_of_another_gamma_are_told_in_ours() -> None:
    theirs = types_pb2.LengthSketch(gamma=1.1, buckets={50: 4}, sum=4 * 1.1**50)
    row = gateway_pb2.TierDemand(tier="chat", output_tokens=theirs, running_tokens=theirs)
    (window,) = windows(gateway_pb2.DemandReport(window_s=1.0, tiers=[row]))
    (at,) = window.output[0]
    assert GAMMA**at == pytest.approx(1.1**50, rel=0.02)
    assert window.running == window.output[0] == {at: 4}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_figures_that_are_no_numbers_do_not_stay_in_the_estimate(wrong: float, caplog: pytest.LogCaptureFixture) -> None:
    rows = [gateway_pb2.TierDemand(tier="chat", prompt_tokens=types_pb2.LengthSketch(sum=wrong)), gateway_pb2.TierDemand(tier="batch")]
    assert [w.tier for w in windows(gateway_pb2.DemandReport(window_s=1.0, tiers=rows))] == ["batch"]
    assert "tier chat, left out" in caplog.text
    assert windows(gateway_pb2.DemandReport(window_s=wrong, tiers=rows)) == []


def test_small_drift_of_limits_is_no_directive() -> None:
    group = node(10).layout.groups[0]

    def changed(**fields: Any) -> Layout:
        return Layout((replace(group, **fields),))

    assert not drifted(Layout((group,)), changed(capacity=Capacity(12)))
    assert drifted(Layout((group,)), changed(capacity=Capacity(13)))
    assert drifted(Layout((group,)), changed(capacity=replace(group.capacity, prefill_tokens_per_step=512)))
    assert not drifted(Layout((group,)), changed(shares=(TierShare("t", 0.95),)))
    assert drifted(Layout((group,)), changed(shares=(TierShare("t", 0.5),)))
    assert drifted(Layout((group,)), changed(shares=(TierShare("t", 1.0), TierShare("u", 0.0))))
    assert not drifted(Layout(()), changed(capacity=Capacity(99))), "another group is a change of another kind"


def test_figures_are_sums_over_gateways_of_the_last_minute() -> None:
    def report(gateway: str, end: float, finished: int, met: int) -> gateway_pb2.DemandReport:
        r = gateway_pb2.DemandReport(gateway_id=gateway, window_s=10)
        r.window_end.FromNanoseconds(int(end * 1e9))
        r.tiers.add(pool=types_pb2.PoolRef(name="a/p"), tier="t", arrivals=20, finished=finished, met_all=met)
        r.tiers[0].ttft_ms.buckets[0] = finished
        r.tiers[0].ttft_ms.gamma = 1.02
        return r

    figures = Figures()
    for r in (report("g1", 100, 10, 1), report("g1", 160, 10, 9), report("g2", 165, 10, 10)):
        figures.add(r)
    now = figures.tier("a/p", "t", 170)
    assert (now.finished, now.met_all, now.rate, now.goodput) == (20, 19, 4.0, 1.9), "the first is over a minute old"
    assert now.ttft_ms.quantile(0.5) == 1.0
    assert figures.tier("a/p", "other", 170).attainment is None


def test_a_new_leader_takes_over_what_the_last_one_wrote() -> None:
    first = judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted
    wrong = pool("p", "2026-01-01T00:00:00Z", 2, budget={"gpus": 0})
    kept = json.dumps(pool("p", "2026-01-01T00:00:00Z")["spec"])
    remembered = spec_in_force({**wrong, "status": {"accepted": {"generation": 1, "spec": kept}}}, ("slot",), {})
    assert remembered == first
    assert spec_in_force(wrong, ("slot",), {}) is None
    history = History()
    history.adopt("a/p", {"flips": 7, "lastFlips": [{"time": "2026-01-01T00:00:00Z", "from": "2xTP1", "to": "1xTP2", "outcome": "Done"}]})
    assert (history.total("a/p"), history.last("a/p")[0].to) == (7, "1xTP2")


def test_a_lost_node_holds_its_gpus_until_its_node_is_gone_or_tainted() -> None:
    status = {
        "gpus": [{"uuid": "g0", "index": 0}, {"uuid": "g1", "index": 1}],
        "groups": [{"id": "x", "pool": "a/p", "tp": 2, "state": "Open", "gpus": [0, 1]}],
    }
    lost = lost_agent({"spec": {"agentId": "n1", "nodeName": "n1"}, "status": status})
    assert lost is not None
    store, fleet = Store(), Fleet()
    store.saw_node("n1", {}, [])
    fleet.adopt([lost])
    fleet.observe([], store)
    assert not fleet.agents["n1"].connected
    taken = snapshot(fleet.agents, {}, (), {}, {}, PlannerSettings())
    assert taken.holds == {"a/p": ("g0", "g1")}
    store.saw_node("n1", {}, [OUT_OF_SERVICE])
    fleet.observe([], store)
    assert not fleet.agents
    assert not fleet.removed, "its Node is still there, so its ServingNode stays"
    fleet.adopt([lost])
    store.lost_node("n1")
    fleet.observe([], store)
    assert fleet.removed == {"n1"}


def lost(agent_id: str, node: str, *gpus: str, pool: str = "a/p") -> Agent:
    """Known from its ServingNode only."""
    listed = [{"uuid": u, "index": i} for i, u in enumerate(gpus)]
    groups = [{"id": "x", "pool": pool, "tp": len(gpus), "state": "Open", "gpus": list(range(len(gpus)))}]
    found = lost_agent({"spec": {"agentId": agent_id, "nodeName": node}, "status": {"gpus": listed, "groups": groups}})
    assert found is not None
    return found


def link(agent_id: str, node: str, *gpus: str, heard: float | None = None, **report: Any) -> Link:
    """To an agent that reports now, or did at `heard` (monotonic)."""
    described = agent_pb2.DescribeResponse(
        agent_id=agent_id, node_name=node, gpus=[agent_pb2.Gpu(uuid=u, index=i) for i, u in enumerate(gpus)]
    )
    found = agent_pb2.NodeReport(agent_id=agent_id, host_connected=True, **report)
    return Link(Endpoint(f"{agent_id}:1", node), "agent", None, described, found, time.monotonic() if heard is None else heard)  # type: ignore[arg-type]


def test_a_pod_that_follows_another_on_its_node_frees_what_that_one_held() -> None:
    """Agents of a DaemonSet are named after their pods, so every roll-out replaces them while the Nodes stay."""
    store, fleet = Store(), Fleet()
    store.saw_node("n1", {}, [])
    fleet.adopt([lost("pod-1", "n1", "g0", "g1")])
    fleet.observe([], store)
    assert set(fleet.agents) == {"pod-1"}
    fleet.observe([link("pod-2", "n1", "g0")], store)
    held = snapshot(fleet.agents, {}, (), {}, {}, PlannerSettings()).holds
    assert held == {"a/p": ("g1",)}, "the new pod has only one of its GPUs"
    fleet.observe([link("pod-2", "n1", "g0", "g1")], store)
    assert (set(fleet.agents), fleet.removed) == ({"pod-2"}, {"pod-1"})


def test_a_node_that_is_gone_frees_its_gpus_although_its_endpoint_is_still_announced() -> None:
    store, fleet = Store(), Fleet()
    store.saw_node("n1", {}, [])
    old = link("n1", "n1", "g0", heard=-100.0)
    fleet.observe([old], store)
    assert fleet.agents["n1"].trouble == "StaleReports"
    store.saw_node("n1", {}, [OUT_OF_SERVICE])
    fleet.observe([old], store)
    assert (fleet.agents, fleet.removed) == ({}, set())
    store.lost_node("n1")
    fleet.observe([old], store)
    assert fleet.removed == {"n1"}
    fleet.removed.clear()  # deleted
    fleet.observe([old], store)
    assert not fleet.removed, "once is enough"
    fleet.observe([link("n1", "n1", "g0")], store)
    assert fleet.agents["n1"].connected, "it came back"


def test_a_node_that_dies_in_a_flip_does_not_hold_the_pool_for_ever() -> None:
    fleet, store = Fleet(), Store()
    store.saw_node("n1", {}, [])
    shares = [types_pb2.TierShare(tier="t", share=1.0)]
    group = types_pb2.Group(group_id="e", engine_id="e", pool=types_pb2.PoolRef(name="a/p"), tp_size=1, gpu_uuids=["g0"], shares=shares)
    flip = agent_pb2.FlipReport(outcome=agent_pb2.FlipReport.OUTCOME_RUNNING)
    found = link("n1", "n1", "g0", groups=[agent_pb2.GroupReport(group=group)], flip=flip, in_progress_operation_id="o")
    fleet.observe([found], store)
    assert fleet.flipping("a/p") == {"t"}
    assert reason(shown(fleet.agents["n1"]), "Ready") == ("False", "AwaitingEngines")
    for state in (types_pb2.GROUP_STATE_CLOSING, types_pb2.GROUP_STATE_OPENING):
        found.report.groups[0].state = state
        assert reason(shown(fleet.agents["n1"]), "Ready") == ("True", "Serving"), "its requests wait, and nobody need look"
    assert reason(shown(fleet.agents["n1"]), "Progressing") == ("True", "Flipping")
    found.heard_at = -100.0
    fleet.observe([found], store)
    assert not fleet.flipping("a/p"), "else demand would be frozen until its Node is deleted"
    assert reason(shown(fleet.agents["n1"]), "Progressing")[1] != "Flipping"
    assert reason(shown(fleet.agents["n1"]), "Ready") == ("Unknown", "StaleReports"), "its host may serve on"
    found.endpoint = replace(found.endpoint, terminating=True)
    fleet.observe([found], store)
    assert reason(shown(fleet.agents["n1"]), "Ready")[0] == "False"


def test_who_claims_to_be_another_agent_is_left_alone() -> None:
    store, fleet = Store(), Fleet()
    store.saw_node("n1", {}, [])
    honest, thief = link("n1", "n1", "g0"), link("n1", "n1", "g9")
    thief.endpoint = Endpoint("10.0.0.9:1", "n1")
    fleet.observe([honest], store)
    for links in ([thief, honest], [honest, thief]):
        fleet.observe(links, store)
        assert [g.uuid for g in fleet.agents["n1"].described.gpus] == ["g0"], "who had the name keeps it"
        assert fleet.strangers == (("WrongIdentity", "10.0.0.9:1: says that it is agent 'n1', as another does"),)
    honest.heard_at = -100.0
    fleet.observe([honest, thief], store)
    assert [g.uuid for g in fleet.agents["n1"].described.gpus] == ["g9"], "e.g. it was started anew elsewhere"


def test_gateways_are_sent_where_kubernetes_says_that_the_node_is() -> None:
    fleet = Fleet()
    found = link("n1", "n1", "g0")
    found.described.node_address = "10.0.0.66:7444"
    fleet.observe([found], Store())
    assert fleet.agents["n1"].node_address == "10.0.0.66:7444", "it is all we know"
    found.endpoint = Endpoint("10.0.0.1:7443", "n1", "10.0.0.1:7444")
    fleet.observe([found], Store())
    assert fleet.agents["n1"].node_address == "10.0.0.1:7444"


def test_a_host_whose_agent_is_away_is_still_routed_to() -> None:
    """It goes on without the agent, for as long as that takes."""
    accepted: Any = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    store, fleet = Store(), Fleet()
    group = types_pb2.Group(group_id="e", pool=types_pb2.PoolRef(name="a/p"), epoch=3)
    found = link("n1", "n1", "g0", groups=[agent_pb2.GroupReport(group=group, state=types_pb2.GROUP_STATE_OPEN)])
    other = link("n2", "n2", "g1", groups=[agent_pb2.GroupReport(group=group, state=types_pb2.GROUP_STATE_OPEN)])
    for n in ("n1", "n2"):
        store.saw_node(n, {}, [])

    def routed(*links: Link) -> list[str]:
        fleet.observe(links, store)
        return [n.agent_id for n in routes(accepted, fleet.agents)[0].nodes]

    assert routed(found) == ["n1"]
    found.heard_at = -100.0
    assert routed(found) == ["n1"]
    assert not fleet.agents["n1"].connected
    found.endpoint = replace(found.endpoint, terminating=True)
    assert routed(found, other) == ["n2"], "of one that is ending and away nobody hopes for anything"
    found.heard_at = time.monotonic()
    assert routed(found, other) == ["n2"], "its Pod is ending, so its streams leave while there is time"
    other.endpoint = replace(other.endpoint, terminating=True)
    assert routed(found, other) == ["n1", "n2"], "there is nowhere to go"
    other.endpoint = replace(other.endpoint, terminating=False)
    assert routed(other) == ["n2"], "the Pod is gone"
    other.heard_at, other.problem, other.trouble = -100.0, "speaks contract v9", Reason.CONTRACT_VERSION_MISMATCH
    assert routed(other) == [], "left alone is left alone"


def test_a_cordoned_node_keeps_what_it_runs_and_gets_nothing_new() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    fleet, store = Fleet(), Store()
    store.saw_node("n1", {}, [], cordoned=True)
    store.saw_node("n2", {}, [], cordoned=True)
    running = types_pb2.Group(
        group_id="e", engine_id="e", pool=types_pb2.PoolRef(name="a/p"), model="tiny-llama", tp_size=1, gpu_uuids=["g0"]
    )
    report = agent_pb2.GroupReport(group=running, state=types_pb2.GROUP_STATE_OPEN)
    fleet.observe([link("n1", "n1", "g0", "g1", groups=[report]), link("n2", "n2", "g2")], store)
    made = decide(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings()), 0.0)
    assert [sorted(n.layout.gpu_uuids) for n in made.nodes] == [["g0"], []]
    gone = decide(snapshot(fleet.agents, {}, (), {}, {}, PlannerSettings()), 0.0)
    assert not gone.nodes[0].layout.groups, "a pool that was deleted ends there too"
    store.saw_node("n2", {}, [])
    fleet.observe([link("n1", "n1", "g0", "g1", groups=[report]), link("n2", "n2", "g2")], store)
    made = decide(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings()), 0.0)
    assert [sorted(n.layout.gpu_uuids) for n in made.nodes] == [["g0"], ["g2"]], "a budget of two, one of them on the cordoned node"


def test_a_node_that_is_to_be_drained_is_emptied_and_comes_back() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    fleet, store, planes = Fleet(), Store(), Planes()
    running = types_pb2.Group(
        group_id="e", engine_id="e", pool=types_pb2.PoolRef(name="a/p"), model="tiny-llama", tp_size=1, gpu_uuids=["g0"]
    )
    report = agent_pb2.GroupReport(group=running, state=types_pb2.GROUP_STATE_OPEN)
    now = 0.0

    def plan(*links: Link, **n1: Any) -> list[int]:
        """GPUs that the plan gives to each node."""
        nonlocal now
        now += 1.0
        store.saw_node("n1", {}, **n1)
        fleet.observe(links, store)
        made = planes(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings()), now)
        return [len(n.layout.gpu_uuids) for n in made.nodes]

    full, empty, other = link("n1", "n1", "g0", "g1", groups=[report]), link("n1", "n1", "g0", "g1"), link("n2", "n2", "g2", "g3")
    assert plan(full, other, taints=[])[0], "it stays where it is"
    for cordoned in (False, True):  # as `kubectl drain` leaves a node
        assert plan(full, other, taints=[DRAIN], cordoned=cordoned) == [0, 1], "a budget of two, one of them is not free yet"
    assert reason(shown(fleet.agents["n1"]), "Degraded") == ("True", "Draining")
    full.report.groups[0].group.pool.name = "a/q"
    assert reason(shown(fleet.agents["n1"]), "Degraded") == ("False", "Healthy"), "that is the other pool's business"
    full.report.groups[0].group.pool.name = "a/p"
    assert plan(empty, other, taints=[DRAIN]) == [0, 2]
    assert reason(shown(fleet.agents["n1"]), "Degraded") == ("False", "Healthy"), "it was asked for, and is done"
    [serving] = [c for c in node_status(fleet.agents["n1"], {}, "2026-01-01T00:00:00Z").conditions or [] if c.type == "Serving"]
    assert (serving.status, serving.reason) == ("False", "Draining")
    store.saw_node("n2", {}, [], cordoned=True)
    assert plan(empty, other, taints=[]) == [2, 0], "it is as good as any other again"
    store.saw_node("n2", {}, [DRAIN])
    assert plan(full, other, taints=[DRAIN]) == [2, 0], "there is no other node"
    assert plan(empty, other, taints=[DRAIN]) == [0, 0], "but nothing comes to a node that is to be drained"
    store.saw_node("n2", {}, [], cordoned=True)
    assert plan(empty, other, taints=[DRAIN]) == [0, 0]


def test_what_one_agent_says_wrongly_does_not_stop_the_plan_of_all() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    group = types_pb2.Group(
        group_id="e", engine_id="e", pool=types_pb2.PoolRef(name="a/p"), model="tiny-llama", tp_size=1, gpu_uuids=["g0"]
    )
    other = types_pb2.Group(
        group_id="e", engine_id="f", pool=types_pb2.PoolRef(name="a/p"), model="tiny-llama", tp_size=1, gpu_uuids=["g1"]
    )
    wrong = link("n1", "n1", "g0", "g1", "g0", groups=[agent_pb2.GroupReport(group=g) for g in (group, other)])
    wrong.described.gpus[1].index = 0
    fleet = Fleet()
    fleet.observe([wrong, link("n2", "n2", "g2")], Store())
    made = decide(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings()), 0.0)
    assert [len(n.layout.gpu_uuids) for n in made.nodes] == [1, 1]


def test_a_node_that_joins_does_not_narrow_what_others_may_run() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    facts = [agent_pb2.ModelFacts(model="tiny-llama", legal_tp=[1, 2])]
    fleet, store = Fleet(), Store()
    fleet.observe([link("n1", "n1", "g0", "g1", models=facts), link("n2", "n2", "g2")], store)
    taken = snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings())
    assert [n.node.legal_tp["tiny-llama"] for n in taken.nodes] == [(1, 2), (1, 2)]


def test_a_pool_without_a_spec_in_force_runs_on() -> None:
    """E.g. its profile is gone since the operator was started anew."""
    running = types_pb2.Group(group_id="e", engine_id="e", pool=types_pb2.PoolRef(name="a/q"), model="m", tp_size=1, gpu_uuids=["g0"])
    found = link("n1", "n1", "g0", "g1", groups=[agent_pb2.GroupReport(group=running, state=types_pb2.GROUP_STATE_OPEN)])
    found.report.applied_operation_id = "of-an-earlier-leader.1"
    fleet, executor = Fleet(), Executor(carried=frozenset({"a/q"}))
    fleet.observe([found], Store())
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    made = decide(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings(), executor.carried), 0.0)
    assert made.pools[0].verdict == "Blocked"
    assert not executor.wanted(fleet.agents["n1"], made.nodes[0], accepted)
    executor.carried = frozenset()  # deleted
    made = decide(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings(), executor.carried), 0.0)
    assert executor.wanted(fleet.agents["n1"], made.nodes[0], accepted)


def test_a_refusal_counts_against_the_pool_that_it_names() -> None:
    models = {"a/p": "tiny", "a/q": "tiny-llama", "a/r": "other"}
    assert named("model tiny-llama cannot be split in 4: legal TP degrees are [1, 2]", models) == ["a/q"]
    assert named("model tiny cannot be split in 4", models) == ["a/p"]
    assert named("no", models) == ["a/p", "a/q", "a/r"]


def test_before_any_agent_reports_nothing_is_said_of_the_spec() -> None:
    result = judge({"a/p": pool("p", "2026-01-01T00:00:00Z")}, {}, (), {}, {}, {})["a/p"]
    assert (result.status, result.reason, result.accepted) == ("Unknown", "ModelFactsPending", None)
    before = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    again = judge({"a/p": pool("p", "2026-01-01T00:00:00Z")}, {}, (), {}, {}, before)["a/p"]  # type: ignore[arg-type]
    assert (again.status, again.accepted) == ("True", before["a/p"]), "all agents are gone, the spec is what it was"


def shown(*agents: Agent, before: dict[str, Any] | None = None, plan: PoolPlan | None = None, **other: Any) -> PoolStatus:
    obj = pool("p", "2026-01-01T00:00:00Z")
    judgement = judged([obj])["a/p"]
    assert judgement.accepted is not None
    by_id = {a.agent_id: a for a in agents}
    taken = snapshot(by_id, {"a/p": judgement.accepted}, (), {}, {}, PlannerSettings())
    made = other.pop("made", None) or (decide(taken, 0.0) if plan is None else Plan("x", (), (plan,)))
    seen = Seen(taken, made, by_id, (), Figures(), {}, other.pop("operations", {}), 1, 100.0, **other)
    return pool_status(obj, judgement, seen, before or {}, [], 0)


def reason(status: PoolStatus, kind: str) -> tuple[str, str]:
    return next((c.status, c.reason) for c in status.conditions or [] if c.type == kind)


def agent_of(found: Link) -> Agent:
    return Agent(found.described.agent_id, found.described, found.report)


def test_conditions_say_what_is_wrong() -> None:
    whole = agent_of(link("n1", "n1", "g0", "g1"))
    assert reason(shown(whole), "Degraded") == ("False", "Healthy")
    assert reason(shown(agent_of(link("n1", "n1", "g0"))), "Degraded") == ("True", "NotEnoughGpus")
    reverted = agent_pb2.FlipReport(outcome=agent_pb2.FlipReport.OUTCOME_REVERTED, message="it did not wake")
    assert reason(shown(agent_of(link("n1", "n1", "g0", "g1", flip=reverted))), "Degraded") == ("True", "FlipReverted")
    hostless = agent_of(link("n1", "n1", "g0", "g1"))
    hostless.report.host_connected = False
    assert reason(shown(hostless), "Degraded") == ("True", "HostUnavailable")
    other = (("ContractVersionMismatch", "gateway 10.0.0.1:7445: speaks contract v9"),)
    assert reason(shown(whole, gateways=other), "Degraded") == ("True", "ContractVersionMismatch")


def test_advisory_says_what_it_would_do() -> None:
    obj = pool("p", "2026-01-01T00:00:00Z", adaptation={"mode": "Advisory"})
    would = PoolPlan("a/p", 2, 1.0, (), ("Advisory: would change 2xTP1 to 1 x TP2",), would_change=True)
    standing = Standing(judged([obj])["a/p"], would, (), (), (), frozenset(), frozenset(), {})
    assert standing.rows()[PoolCondition.PROGRESSING] == ("False", "Advisory", would.reasons[-1])


def test_nothing_is_as_planned_where_nothing_is_planned() -> None:
    good, refused = judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"], judged([pool("p", "2026-01-01T00:00:00Z", profile="none")])["a/p"]
    rows = [Standing(j, None, (), (), (), frozenset(), frozenset(), {}).rows()[PoolCondition.PROGRESSING] for j in (good, refused)]
    assert [row[:2] for row in rows] == [("False", "NoPlanYet"), ("False", "NotAccepted")]


def test_why_the_layout_is_as_it_is_stays_said_while_it_comes_about() -> None:
    whole = agent_of(link("n1", "n1", "g0", "g1"))
    decided = shown(whole).dump()
    assert decided["plan"]["reasons"][-1] == "first layout: 2xTP1"
    made = decide(
        snapshot({"n1": whole}, {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}, (), {}, {}, PlannerSettings()), 0
    )  # type: ignore[dict-item]
    flipping = replace(made, pools=(replace(made.pools[0], reasons=("a flip is running",), held="a flip is running"),))
    under_way = shown(whole, before=decided, made=flipping).dump()["plan"]
    assert (under_way["verdict"], under_way["held"], under_way["reasons"][-1]) == ("Change", "a flip is running", "first layout: 2xTP1")
    blocked = replace(flipping, pools=(replace(made.pools[0], reasons=("no GPU",), verdict=Verdict.BLOCKED),))
    stuck = shown(whole, before=decided, made=blocked).dump()
    assert stuck["plan"]["reasons"] == ["no GPU"]
    assert shown(whole, before=stuck, made=made).dump()["plan"]["reasons"][-1] == "first layout: 2xTP1", "it is blocked no more"


def test_status_says_roles_and_a_change_of_role_is_a_new_plan() -> None:
    whole = agent_of(link("n1", "n1", "g0", "g1"))
    taken = snapshot({"n1": whole}, {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}, (), {}, {}, PlannerSettings())  # type: ignore[dict-item]
    made = decide(taken, 0)
    (node,) = made.nodes
    parts = zip(node.layout.groups, (Role.PREFILL, Role.DECODE), strict=True)
    groups = tuple(replace(g, role=role, shares=(TierShare("t", 1.0),)) for g, role in parts)
    roles = replace(made, nodes=(replace(node, layout=Layout(groups)),))
    mixed = shown(whole, made=made).dump()["plan"]
    plan = shown(whole, made=roles, before={"plan": mixed}).dump()["plan"]
    assert (plan["layout"], plan["serving"]) == ("1xTP1 prefill + 1xTP1 decode", "1xTP1 prefill t, 1xTP1 decode t")
    assert (plan["id"] != mixed["id"], plan["generation"]) == (True, mixed["generation"] + 1)

    def running(of: tuple[Group, ...]) -> Agent:
        reports = [agent_pb2.GroupReport(group=group_proto(g, "u"), state=types_pb2.GROUP_STATE_OPEN) for g in of]
        return agent_of(link("n1", "n1", "g0", "g1", groups=reports))

    assert shown(running(groups), made=roles).dump()["plan"]["verdict"] == "Keep"
    assert shown(running(node.layout.groups), made=roles).dump()["plan"]["verdict"] == "Change", "its roles are not there yet"
    assert node_status(running(groups), {}, "2026-01-01T00:00:00Z").layout == "1xTP1 prefill + 1xTP1 decode"


def test_figures_and_what_follows_from_them_are_no_reason_to_write_at_once() -> None:
    whole = agent_of(link("n1", "n1", "g0", "g1"))
    good, bad = (PoolPlan("a/p", 2, 1.0, (TierOutlook("t", 1.0, 2.0, ok, "TTFT"),), ()) for ok in (True, False))
    first = shown(whole, plan=good).dump()
    second = shown(whole, plan=bad, before=first).dump()
    assert first != second
    assert without_figures(first) == without_figures(second)


def test_status_says_who_serves_whom_what_is_held_and_what_would_help() -> None:
    whole = agent_of(link("n1", "n1", "g0", "g1"))
    first = shown(whole).dump()
    assert first["plan"]["serving"] == "2xTP1 t"
    tier = TierOutlook("t", 4.0, 2.0, False, "TTFT at TP 1")
    held = PoolPlan("a/p", 2, 2.0, (tier,), ("r",), ("2xTP1: less",), held="a flip is running", remedies=("t: 3 GPUs in all would hold t",))
    second = shown(whole, plan=held, before=first)
    plan = second.dump()["plan"]
    assert (plan["held"], plan["remedies"], plan["rejected"]) == ("a flip is running", ["t: 3 GPUs in all would hold t"], ["2xTP1: less"])
    (row,) = second.dump()["tiers"]
    assert (row["slack"], row["binding"], row["feasible"]) == ("0.5x", "TTFT at TP 1", False)
    assert next(c.message for c in second.conditions or [] if c.type == "Feasible") == "t: 3 GPUs in all would hold t."
    long = PoolPlan(
        "a/p", 2, 2.0, (replace(tier, binding="x" * 500),), ("r" * 999,) * 30, ("j" * 999,) * 30, held="h" * 999, remedies=("w" * 999,) * 30
    )
    bounded = shown(whole, plan=long).dump()
    assert [len(bounded["plan"][k]) for k in ("held", "reasons", "rejected", "remedies")] == [512, 16, 8, 8]
    assert {len(x) for k in ("reasons", "rejected", "remedies") for x in bounded["plan"][k]} == {512}


def test_what_a_status_says_no_more_is_taken_out_at_every_depth() -> None:
    old = {"layout": "x", "plan": {"held": "a flip is running", "id": "1"}, "reason": "r"}
    assert merge_patch(old, {"layout": "x", "plan": {"id": "1"}}) == {"layout": "x", "plan": {"held": None, "id": "1"}, "reason": None}


def test_only_tiers_of_groups_on_nodes_with_a_directive_in_work_flip() -> None:
    def group(name: str, uuid: str, *tiers: str) -> agent_pb2.GroupReport:
        wire = types_pb2.Group(group_id=name, engine_id=name, pool=types_pb2.PoolRef(name="a/p"), tp_size=1, gpu_uuids=[uuid])
        wire.shares.extend(types_pb2.TierShare(tier=t, share=0.5) for t in tiers)
        return agent_pb2.GroupReport(group=wire, state=types_pb2.GROUP_STATE_OPEN)

    fleet = Fleet()
    still, busy = link("n1", "n1", "g0", groups=[group("e", "g0", "a", "b")]), link("n2", "n2", "g1", groups=[group("f", "g1", "b")])
    busy.report.in_progress_operation_id = "x.1"
    fleet.observe([still, busy], Store())
    assert fleet.flipping("a/p") == {"b"}
    assert fleet.flipping("a/q") == frozenset()


def test_limits_that_are_sent_anew_do_not_change_the_plan_of_status() -> None:
    whole = agent_of(link("n1", "n1", "g0", "g1"))
    first = shown(whole, operations={"n1": "abc.7", "elsewhere": "fff.1"}).dump()
    assert first["plan"]["operationId"] == "abc.7", "only of nodes that the pool is on"
    assert shown(whole, operations={"n1": "abc.8"}, before=first).dump()["plan"] == first["plan"]
    assert shown(whole, operations={"n1": "abd.9"}, before=first).dump()["plan"]["operationId"] == "abd.9"


async def test_a_renewed_certificate_means_new_channels_that_know_what_the_old_ones_knew(tmp_path: Path) -> None:
    ca = new_ca()

    def write() -> None:
        for name, value in issue(ca, Identity("operator", "operator")).items():
            (tmp_path / name).write_bytes(value)

    links = Links()
    found = (Endpoint("192.0.2.1:1"),)
    write()
    await links.update("agent", found, tmp_path)
    first = links.agents["192.0.2.1:1"]
    first.heard_at = 5.0
    await links.update("agent", found, tmp_path)
    assert links.agents["192.0.2.1:1"] is first
    write()
    await links.update("agent", found, tmp_path)
    second = links.agents["192.0.2.1:1"]
    assert (second.channel is not first.channel, second.heard_at) == (True, 5.0)
    assert first.task is not None
    assert first.task.done()
    await links.close()


def test_every_documented_reason_is_given_by_the_operator() -> None:
    code = "".join(p.read_text() for p in Path(nitsum_operator.__file__).parent.glob("*.py"))
    literal = "".join(p.read_text() for p in (ROOT / "proto/nitsum_api/resources.py", ROOT / "core/nitsum/errors.py"))
    unused = [r for r in Reason if f"Reason.{r.name}" not in code and f'"{r.value}"' not in code + literal]
    assert not unused


def test_a_new_leader_does_not_send_limits_of_what_it_has_hardly_seen() -> None:
    accepted = {"a/p": judged([pool("p", "2026-01-01T00:00:00Z")])["a/p"].accepted}
    found, fleet = link("n1", "n1", "g0", "g1"), Fleet()
    fleet.observe([found], Store())
    wanted = decide(snapshot(fleet.agents, accepted, (), {}, {}, PlannerSettings()), 0.0).nodes[0]
    assert wanted.layout.groups
    found.report.applied_operation_id = f"{digest(wanted, accepted)}.1"
    runs = [replace(g, capacity=Capacity(g.capacity.max_running * 2 + 9)) for g in wanted.layout.groups]
    found.report.groups.extend(agent_pb2.GroupReport(group=group_proto(g, "u"), state=types_pb2.GROUP_STATE_OPEN) for g in runs)
    fleet.observe([found], Store())
    executor = Executor()
    assert not executor.wanted(fleet.agents["n1"], wanted, accepted)
    executor.began -= REFRESH_S
    assert executor.wanted(fleet.agents["n1"], wanted, accepted)
    executor.leads()
    assert not executor.wanted(fleet.agents["n1"], wanted, accepted), "nor does one that has waited for long to lead"


async def test_a_term_begins_when_the_lease_is_held_not_with_the_process() -> None:
    waits = Reconciler.__new__(Reconciler)
    waits._executor, waits._listed_at, waits._held_at = Executor(began=time.monotonic() - 3600), 1.0, 0.0
    waits._links = waits._store = SimpleNamespace(highest_term=0)  # type: ignore[assignment]
    waits._delivery = SimpleNamespace(stale_term=0)  # type: ignore[assignment]
    waits._leader = SimpleNamespace(term=0, hold=lambda seen: None)  # type: ignore[assignment]

    async def listed() -> None:
        pass

    waits._list = listed  # type: ignore[method-assign]
    assert not await waits._lead()
    assert time.monotonic() - waits._executor.began > REFRESH_S
    waits._leader.hold = lambda seen: setattr(waits._leader, "term", 7)  # type: ignore[method-assign]
    assert await waits._lead()
    assert time.monotonic() - waits._executor.began < REFRESH_S
