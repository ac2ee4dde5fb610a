"""The operator's pure parts: which spec is in force, when a directive differs, who gets which term."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from nitsum.errors import InvalidSpec
from nitsum.layout import Capacity, Group, Layout, TierShare
from nitsum.planner.types import NodePlan
from nitsum.residency import Residency, ResidentEngine
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity
from nitsum_operator import settings
from nitsum_operator.accept import Judgement, judge
from nitsum_operator.execute import digest, directive
from nitsum_operator.issuer import due
from nitsum_operator.leader import next_term
from nitsum_operator.links import Endpoint, endpoints


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
    assert result.reason == "ProfileNotFound"
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
