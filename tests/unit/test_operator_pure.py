"""The operator's pure parts: which spec is in force, when a directive differs, who gets which term."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from nitsum.errors import InvalidSpec
from nitsum.layout import Capacity, Group, Layout, TierShare
from nitsum.planner.types import NodePlan, PlannerSettings
from nitsum.residency import Residency, ResidentEngine
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity
from nitsum_api.types.v1 import types_pb2
from nitsum_operator import settings
from nitsum_operator.accept import Judgement, judge
from nitsum_operator.drift import drifted
from nitsum_operator.execute import digest, directive
from nitsum_operator.figures import Figures
from nitsum_operator.fleet import Fleet
from nitsum_operator.handlers import OUT_OF_SERVICE, Store
from nitsum_operator.history import History
from nitsum_operator.issuer import due
from nitsum_operator.leader import next_term
from nitsum_operator.links import Endpoint, endpoints
from nitsum_operator.plan import snapshot
from nitsum_operator.remember import lost_agent, spec_in_force


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


def test_terms_and_certificates() -> None:
    assert next_term(3, 9) == 10
    now = datetime.now(UTC)
    leaf = issue(new_ca(now), Identity("agent", "x"), now=now, hours=30)["tls.crt"]
    assert not due(leaf, now + timedelta(hours=19))
    assert due(leaf, now + timedelta(hours=21))
    assert due(b"", now)


def test_endpoints_sorted_once_with_node_port() -> None:
    ports = [SimpleNamespace(name="agent", port=1), SimpleNamespace(name="node", port=2)]
    one = SimpleNamespace(ports=ports, endpoints=[SimpleNamespace(addresses=["10.0.0.9"], node_name="n")])
    assert endpoints([one, one], "agent") == (Endpoint("10.0.0.9:1", "n", "10.0.0.9:2"),)
    assert endpoints([one], "gateway") == ()


def test_settings_name_the_wrong_key() -> None:
    assert settings.parse({"planner": {"cooldownSeconds": 2}}).planner.cooldown_s == 2.0
    with pytest.raises(InvalidSpec, match=r"planner\.cooldown"):
        settings.parse({"planner": {"cooldown": 2}})


def test_small_drift_of_limits_is_no_directive() -> None:
    group = node(10).layout.groups[0]

    def changed(**fields: Any) -> Layout:
        return Layout((replace(group, **fields),))

    assert not drifted(Layout((group,)), changed(capacity=Capacity(12)))
    assert drifted(Layout((group,)), changed(capacity=Capacity(13)))
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
