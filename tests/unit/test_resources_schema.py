"""The typed resources have the same fields as the schema in crds/, and the documented conditions are those of the code."""

import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from nitsum.errors import InvalidSpec
from nitsum.pool import Pool
from nitsum_api import conditions, resources

ROOT = Path(__file__).parents[2]


def schema(plural: str) -> dict[str, Any]:
    crd = yaml.safe_load((ROOT / f"crds/nitsum.io_{plural}.yaml").read_text())
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def bare(annotation: Any) -> Any:
    """The type without `| None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def check(model: type[BaseModel], node: dict[str, Any], path: str) -> None:
    fields = {f.alias or name: f for name, f in model.model_fields.items()}
    assert set(fields) == set(node["properties"]), path
    assert {n for n, f in fields.items() if f.is_required()} == set(node.get("required", [])), path
    for name, field in fields.items():
        check_type(bare(field.annotation), node["properties"][name], f"{path}.{name}")


def check_type(kind: Any, node: dict[str, Any], path: str) -> None:
    origin = typing.get_origin(kind)
    if origin is list:
        assert node["type"] == "array", path
        check_type(bare(typing.get_args(kind)[0]), node["items"], f"{path}[]")
    elif origin is dict:
        assert node["type"] == "object", path
        assert "additionalProperties" in node, path
    elif origin is typing.Literal:
        assert list(typing.get_args(kind)) == node["enum"], path
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        check(kind, node, path)
    else:
        assert {str: "string", int: "integer", float: "number", bool: "boolean"}[kind] == node["type"], path


@pytest.mark.parametrize(
    ("plural", "part", "model"),
    [
        (resources.POOLS, "spec", resources.PoolSpec),
        (resources.POOLS, "status", resources.PoolStatus),
        (resources.NODES, "spec", resources.NodeSpec),
        (resources.NODES, "status", resources.NodeStatus),
    ],
)
def test_types_and_schema_agree(plural: str, part: str, model: type[BaseModel]) -> None:
    check(model, schema(plural)["properties"][part], part)


@pytest.mark.parametrize("plural", [resources.POOLS, resources.NODES])
def test_every_field_is_described_and_bounded(plural: str) -> None:
    def walk(node: dict[str, Any], path: str) -> None:
        assert path == ".metadata" or node.get("description"), f"{path} has no description"
        if node["type"] == "array":
            assert "maxItems" in node, path
            walk(node["items"], f"{path}[]")
        if node["type"] == "string" and path not in (".apiVersion", ".kind"):
            assert "maxLength" in node or "enum" in node or node.get("format") == "date-time", path
        for name, child in node.get("properties", {}).items():
            walk(child, f"{path}.{name}")

    walk(schema(plural), "")


def test_conditions_page_is_current() -> None:
    page = (ROOT / "docs/conditions.md").read_text()
    assert page == conditions.as_markdown(), "python -m nitsum_api.conditions > docs/conditions.md"


def test_summary_reason_is_the_most_urgent() -> None:
    def condition(kind: str, status: typing.Literal["True", "False", "Unknown"], reason: str) -> resources.Condition:
        return resources.Condition(type=kind, status=status, reason=reason, message="", last_transition_time="")

    fine = [condition("Accepted", "True", "Accepted"), condition("Ready", "True", "Serving"), condition("Degraded", "False", "Healthy")]
    assert conditions.summary_reason(fine) == "Serving"
    assert conditions.summary_reason([*fine[:2], condition("Degraded", "True", "AgentLost")]) == "AgentLost"
    assert conditions.summary_reason([condition("Accepted", "False", "InvalidSpec"), *fine[1:]]) == "InvalidSpec"


def example(name: str) -> dict[str, Any]:
    obj: dict[str, Any] = yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
    obj["metadata"] |= {"namespace": "team", "uid": "u1"}
    return obj


def test_example_becomes_the_planners_pool() -> None:
    pool, model = resources.pool_from_resource(example("chat"))
    assert isinstance(pool, Pool)
    assert (pool.name, pool.uid, pool.model, pool.budget_gpus, pool.allowed_tp) == ("team/chat", "u1", "smollm2-135m-instruct", 3, (1, 3))
    assert [(t.name, t.ttft_ms, t.tpot_ms, t.weight, t.default) for t in pool.tiers] == [
        ("interactive", 3000, 400, 4, True),
        ("agents", 20_000, 2000, 1, False),
    ]
    assert model.to_proto().source.path == "/var/lib/nitsum/models/smollm2-135m-instruct"
    assert resources.pool_from_resource(example("tiny"))[0].tiers[2].background


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("tiers", [{"name": "a"}, {"name": "a"}], "spec.tiers"),
        ("tiers", [{"name": "a", "ttft": "2h"}], "spec.tiers[0].ttft"),
        ("tiers", [{"name": "a"}, {"name": "b", "tpot": "fast"}], "spec.tiers[1].tpot"),
        ("tiers", [{"name": "a", "ttft": "1s", "target": "0%"}], "spec.tiers[0].target"),
        ("tiers", [{"ttft": "1s"}], "spec.tiers.[0].name".replace(".[", "[")),
        ("budget", {"gpus": 0}, "spec.budget.gpus"),
        ("tensorParallel", {"allowed": [4, 8]}, "spec.budget.gpus"),
        ("tensorParallel", {"allowed": [2, 3]}, "spec.tensorParallel.allowed"),
        ("model", {"name": "m", "source": {}}, "spec.model.source"),
        ("adaptation", {"mode": "Fast"}, "spec.adaptation.mode"),
    ],
)
def test_what_the_server_let_through_is_refused_by_path(field: str, value: Any, path: str) -> None:
    obj = example("chat")
    obj["spec"][field] = value
    with pytest.raises(InvalidSpec) as refused:
        resources.pool_from_resource(obj)
    assert refused.value.path == path


def test_an_engine_is_of_its_checkpoint() -> None:
    def mark(source: dict[str, Any], name: str = "chat") -> str:
        obj = example("chat")
        obj["spec"]["model"]["source"], obj["metadata"]["name"] = source, name
        return resources.pool_from_resource(obj)[0].checkpoint

    marks = [mark({"path": "/a"}), mark({"path": "/b"}), mark({"pvc": {"claimName": "a"}}), mark({"path": "/a"}, "other")]
    assert len(set(marks)) == 4
    assert mark({"path": "/a"}) == marks[0]
