"""What the operator writes, against a real API server: never over a newer spec or a newer leader, always over what people write."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.resources import GROUP, NODES, POOLS, VERSION, PoolStatus
from nitsum_operator.observe import Agent
from nitsum_operator.write import Writer

ROOT = Path(__file__).parents[2]
NAMESPACE, NAME = "default", "write-chat"
KEY = f"{NAMESPACE}/{NAME}"


@pytest.fixture
def custom(installed: Any, admin: Any) -> Iterator[client.CustomObjectsApi]:
    api = client.CustomObjectsApi(admin)
    body = yaml.safe_load((ROOT / "examples/chat.yaml").read_text()) | {"metadata": {"name": NAME}}
    body["spec"]["adaptation"] = {"mode": "Frozen"}
    body["spec"]["model"]["name"] = f"write-{os.getpid()}"
    api.create_namespaced_custom_object(GROUP, VERSION, NAMESPACE, POOLS, body)
    yield api
    api.delete_namespaced_custom_object(GROUP, VERSION, NAMESPACE, POOLS, NAME)


def stored(api: client.CustomObjectsApi) -> dict[str, Any]:
    found: dict[str, Any] = api.get_namespaced_custom_object(GROUP, VERSION, NAMESPACE, POOLS, NAME)
    return found


async def test_a_status_is_written_once_and_never_over_something_newer(custom: client.CustomObjectsApi) -> None:
    writer, first = Writer(custom), stored(custom)
    assert await writer.pool(KEY, first, PoolStatus(term=3, layout="1xTP1"))
    version = stored(custom)["metadata"]["resourceVersion"]
    assert await writer.pool(KEY, first, PoolStatus(term=3, layout="1xTP1")), "the watch has not brought it back yet"
    assert stored(custom)["metadata"]["resourceVersion"] == version
    assert await writer.pool(KEY, first, PoolStatus(term=3, layout="2xTP1")), "again, before the watch has brought anything"

    second = stored(custom)
    custom.patch_namespaced_custom_object(GROUP, VERSION, NAMESPACE, POOLS, NAME, {"spec": {"budget": {"gpus": 4}}})
    assert not await writer.pool(KEY, second, PoolStatus(term=3, layout="3xTP1")), "planned with a spec that is not the newest"
    third = stored(custom)
    assert third["status"]["layout"] == "2xTP1"
    assert await writer.pool(KEY, third, PoolStatus(term=3, layout="3xTP1"))

    assert await Writer(custom).pool(KEY, stored(custom), PoolStatus(term=4, layout="1xTP2"))
    assert not await writer.pool(KEY, stored(custom), PoolStatus(term=3, layout="3xTP1")), "a newer leader wrote"
    assert stored(custom)["status"] == {"term": 4, "layout": "1xTP2"}


async def test_what_people_write_is_written_over_and_what_is_refused_stops_nothing(custom: client.CustomObjectsApi) -> None:
    writer = Writer(custom)
    mine = PoolStatus(term=3, layout="1xTP1")
    assert await writer.pool(KEY, stored(custom), mine)
    custom.patch_namespaced_custom_object_status(GROUP, VERSION, NAMESPACE, POOLS, NAME, {"status": {"layout": "by hand"}})
    assert await writer.pool(KEY, stored(custom), mine)
    assert stored(custom)["status"]["layout"] == "1xTP1"
    assert await writer.pool(KEY, stored(custom), PoolStatus(term=3, layout="x" * 300)), "logged; other pools go on"
    assert stored(custom)["status"]["layout"] == "1xTP1"


async def test_a_serving_node_that_people_delete_comes_back(custom: client.CustomObjectsApi) -> None:
    described = agent_pb2.DescribeResponse(agent_id="write-node", node_name="write-node", engine_build="b" * 400)
    agent = Agent("write-node", described, agent_pb2.NodeReport(agent_id="write-node", problem="p" * 5000))
    writer = Writer(custom)

    def names() -> list[str]:
        return [o["metadata"]["name"] for o in custom.list_cluster_custom_object(GROUP, VERSION, NODES)["items"]]

    try:
        assert await writer.node(agent, "2026-01-01T00:00:00Z")
        assert not await writer.node(agent, "2026-01-01T00:00:01Z"), "nothing changed"
        custom.delete_cluster_custom_object(GROUP, VERSION, NODES, "write-node")
        agent.report.epoch = 7
        await writer.node(agent, "2026-01-01T00:00:02Z")
        assert await writer.node(agent, "2026-01-01T00:00:03Z"), "the failed write is tried again on a new object"
        assert "write-node" in names()
        custom.delete_cluster_custom_object(GROUP, VERSION, NODES, "write-node")
        writer.saw_nodes(custom.list_cluster_custom_object(GROUP, VERSION, NODES)["items"])
        assert await writer.node(agent, "2026-01-01T00:00:04Z"), "found missing when listed"
        assert json.dumps(names()).count("write-node") == 1
        invalid = Agent("Not_A_Name", described, agent_pb2.NodeReport())
        assert await writer.node(invalid, "2026-01-01T00:00:00Z"), "refused by the server, logged, and the others go on"
    finally:
        await writer.remove_node("write-node")
    assert "write-node" not in names()
