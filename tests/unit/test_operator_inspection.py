"""What a spec is judged by: facts that agents read at its very source, asked for before it is in force."""

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import nitsum_operator.inspection
from nitsum.planner.types import PlannerSettings
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Accepted, Judgement, judge
from nitsum_operator.fleet import Fleet
from nitsum_operator.inspection import Inspector, newest
from nitsum_operator.observe import Agent
from nitsum_operator.plan import decide, snapshot
from nitsum_operator.routes import routes

GOOD, BAD = types_pb2.ModelSource(path="/m"), types_pb2.ModelSource(path="/nowhere")


def pool(
    name: str = "p", generation: int = 1, model: str = "tiny-llama", source: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    body = {"model": {"name": model, "source": source or {"path": "/m"}}, "budget": {"gpus": 2}, "tiers": [{"name": "t", "ttft": "1s"}]}
    meta = {"namespace": "a", "name": name, "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z", "generation": generation}
    return {"metadata": meta, "spec": {**body, **spec}}


class Node:
    """An agent that reads checkpoints; `answers` by path: legal TPs, a problem, or a status that the call ends with."""

    def __init__(self, agent_id: str = "n1", gpus: int = 2, **answers: Any) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, Any] = {"/m": [1, 2], "/nowhere": "no config.json there", **answers}
        described = agent_pb2.DescribeResponse(
            agent_id=agent_id, gpus=[agent_pb2.Gpu(uuid=f"{agent_id}-{i}", index=i, type="slot") for i in range(gpus)]
        )
        report = agent_pb2.NodeReport(agent_id=agent_id, host_connected=True)
        self.agent = Agent(agent_id, described, report, link=SimpleNamespace(stub=self))

    async def Inspect(self, request: agent_pb2.InspectRequest, timeout: float) -> agent_pb2.InspectResponse:
        model = request.pools[0].model
        self.calls.append(model.source.path)
        await asyncio.sleep(0)
        answer = self.answers[model.source.path]
        if isinstance(answer, grpc.StatusCode):
            raise grpc.aio.AioRpcError(answer, grpc.aio.Metadata(), grpc.aio.Metadata())
        facts = agent_pb2.ModelFacts(model=model.name, source=model.source)
        if isinstance(answer, str):
            facts.problem = answer
        else:
            facts.legal_tp.extend(answer)
        return agent_pb2.InspectResponse(models=[facts])


class Operator:
    """The part of a cycle that judges."""

    def __init__(self, *nodes: Node) -> None:
        self.fleet = Fleet({n.agent.agent_id: n.agent for n in nodes})
        self.inspector, self.accepted = Inspector(), dict[str, Accepted]()

    async def cycle(self, pools: Iterable[dict[str, Any]]) -> dict[str, Judgement]:
        named = {f"a/{p['metadata']['name']}": p for p in pools}
        for agent in self.fleet.agents.values():
            agent.inspected = {}
        specs = newest(named)
        self.inspector.look([*((a.pool, a.model) for a in self.accepted.values()), *specs.values()], self.fleet.agents)
        pending = {k for k, (p, m) in specs.items() if self.inspector.pending(p, m, self.fleet.agents)}
        judged = judge(named, self.fleet.facts(specs.values()), self.fleet.gpu_types, {}, {}, self.accepted, pending)
        self.accepted = {k: j.accepted for k, j in judged.items() if j.accepted is not None}
        for _ in range(4):
            await asyncio.sleep(0)
        return judged

    async def said(self, *pools: dict[str, Any]) -> tuple[str, str]:
        found = (await self.cycle(pools))[f"a/{pools[-1]['metadata']['name']}"]
        return found.status, found.reason


async def test_a_spec_whose_path_is_not_there_is_never_in_force_and_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    operator = Operator(node)
    assert await operator.said(pool()) == ("Unknown", "ModelFactsPending"), "also the first one, while somebody can read"
    assert await operator.said(pool()) == ("True", "Accepted")
    node.agent.report.models.add(model="tiny-llama", source=GOOD, legal_tp=[1, 2], revision="of-good")  # it runs
    bad = pool(generation=2, source={"path": "/nowhere"})
    held = (await operator.cycle([bad]))["a/p"]
    assert (held.status, held.reason, held.accepted and held.accepted.generation) == ("Unknown", "ModelFactsPending", 1)
    for _ in range(3):
        wrong = (await operator.cycle([bad]))["a/p"]
        assert (wrong.status, wrong.reason, wrong.accepted and wrong.accepted.generation) == ("False", "UnsupportedModel", 1)
    assert "/nowhere: no config.json there" in wrong.message
    assert "Generation 1 stays in force" in wrong.message
    (route,) = routes(operator.accepted, operator.fleet.agents)
    assert (route.model.source, route.model.revision) == (GOOD, "of-good")
    assert node.calls == ["/m", "/nowhere"], "not again so soon"

    assert await operator.said(pool(generation=3)) == ("True", "Accepted"), "the path is mended, and what was read there still counts"
    await operator.cycle([bad])
    node.answers["/nowhere"] = [1]
    monkeypatch.setattr(nitsum_operator.inspection, "RETRY_S", 0.0)
    await operator.cycle([bad])
    assert await operator.said(bad) == ("True", "Accepted"), "the folder is there by now"
    calls = len(node.calls)
    await operator.cycle([bad])
    assert len(node.calls) == calls, "what is good is not read again"
    await operator.cycle([])
    await operator.cycle([])
    assert not operator.inspector.answers, "nothing is kept of pools that are gone"


async def test_what_an_agent_remembers_of_another_source_does_not_count() -> None:
    node = Node()
    operator = Operator(node)
    node.agent.report.models.add(model="tiny-llama", source=BAD, problem="no config.json there")
    node.agent.report.models.add(model="smollm2-135m-instruct", source=GOOD, problem="it was not there then")
    await operator.cycle([pool(), pool("q", model="smollm2-135m-instruct")])
    both = await operator.cycle([pool(), pool("q", model="smollm2-135m-instruct")])
    assert {k: j.status for k, j in both.items()} == {"a/p": "True", "a/q": "True"}, "seen anew, a remembered problem is over"


async def test_tp_is_judged_also_when_no_gpu_is_free_and_small_nodes_do_not_narrow_it() -> None:
    operator = Operator(Node(**{"/nine": [1, 3, 9]}), Node("n2", 1, **{"/nine": [1]}))
    spec = pool(source={"path": "/nine"}, tensorParallel={"allowed": [2]})
    await operator.cycle([spec])
    found = (await operator.cycle([spec]))["a/p"]
    assert (found.reason, found.accepted) == ("IllegalTensorParallel", None)
    assert "legal are 1, 3, 9" in found.message
    assert await operator.said(pool(generation=2, source={"path": "/nine"}, tensorParallel={"allowed": [1, 3]})) == ("True", "Accepted")


async def test_agents_that_cannot_be_asked_hold_nothing_back_and_those_that_fail_do() -> None:
    old = Operator(Node(**{"/m": grpc.StatusCode.UNIMPLEMENTED}))
    await old.cycle([pool()])
    assert await old.said(pool()) == ("True", "Accepted")
    away = Operator(Node(**{"/m": grpc.StatusCode.UNAVAILABLE}))
    await away.cycle([pool()])
    assert await away.said(pool()) == ("Unknown", "ModelFactsPending")
    one = Operator(Node(**{"/m": grpc.StatusCode.UNAVAILABLE}), Node("n2"))
    await one.cycle([pool()])
    assert await one.said(pool()) == ("True", "Accepted"), "one that fails is not waited for where another knows"
    other = pool(budget={"gpus": 2, "nodeSelector": {"zone": "z"}})
    assert await one.said(other) == ("True", "Accepted"), "no agent may run it, so none is asked: as without agents"


async def test_hugging_face_is_refused_in_words() -> None:
    operator = Operator(Node())
    found = (await operator.cycle([pool(source={"huggingFace": {"repo": "a/b"}})]))["a/p"]
    assert (found.status, found.reason) == ("False", "UnsupportedModel")
    assert "spec.model.source.path" in found.message


async def test_a_plan_without_gpus_names_who_has_them() -> None:
    operator = Operator(Node(gpus=2))
    pools = [pool(), pool("q", model="smollm2-135m-instruct", source={"path": "/m"})]
    await operator.cycle(pools)
    await operator.cycle(pools)
    report = next(iter(operator.fleet.agents.values())).report
    for i, gpu in enumerate(next(iter(operator.fleet.agents.values())).described.gpus):
        group = report.groups.add().group
        group.group_id = group.engine_id = f"e{i}-{operator.accepted['a/p'].pool.checkpoint}"
        group.pool.name, group.model, group.tp_size = "a/p", "tiny-llama", 1
        group.gpu_uuids.append(gpu.uuid)
    made = decide(snapshot(operator.fleet.agents, operator.accepted, (), {}, {}, PlannerSettings()), 0.0)
    assert made.pools[1].reasons == ("all GPUs that match are in use by pools a/p",)
