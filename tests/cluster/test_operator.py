"""The operator against a real API server, with the chart's permissions, and an agent that obeys: real gRPC, real mTLS."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from nitsum.faults import FaultPoint
from nitsum.perf.profile import load_shipped
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2, agent_pb2_grpc
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.security import require_role, server_credentials
from nitsum_api.types.v1 import types_pb2

NAMESPACE = os.environ.get("TEST_RELEASE_NAMESPACE", "nitsum-system")
PROFILE = load_shipped("tiny-llama.slot")
POOL = {
    "apiVersion": "nitsum.io/v1alpha1",
    "kind": "ServingPool",
    "metadata": {"name": "op-chat", "namespace": "default"},
    "spec": {
        "model": {"name": "tiny-llama", "source": {"path": "/models/tiny"}},
        "budget": {"gpus": 2},
        "tensorParallel": {"allowed": [1, 2]},
        "tiers": [{"name": "interactive", "ttft": "2s", "tpot": "200ms"}, {"name": "batch"}],
    },
}


class ObedientAgent(agent_pb2_grpc.AgentServiceServicer):
    """A declared port's other side: does at once what a directive says. Refuses TP 4 as a model of two KV heads would."""

    def __init__(self) -> None:
        self.directives: list[agent_pb2.NodeDirective] = []
        self.version = CONTRACT_VERSION
        self.missing = {"/models/missing"}
        self.slower = 0.0
        """Times as slow as the profile says; 0: it tells nothing of its steps."""
        self.serial = 0

    def facts(self, model: types_pb2.Model) -> agent_pb2.ModelFacts:
        if model.source.path in self.missing:
            return agent_pb2.ModelFacts(model=model.name, source=model.source, problem=f"{model.source.path}: no config.json there")
        return agent_pb2.ModelFacts(model=model.name, source=model.source, legal_tp=[1, 2])

    async def Inspect(self, request: agent_pb2.InspectRequest, context: Any) -> agent_pb2.InspectResponse:
        await require_role(context, "operator")
        return agent_pb2.InspectResponse(models=[self.facts(p.model) for p in request.pools])

    @property
    def highest_term(self) -> int:
        return max([7, *(d.term for d in self.directives)])

    async def Describe(self, request: Any, context: Any) -> agent_pb2.DescribeResponse:
        await require_role(context, "operator")
        gpus = [agent_pb2.Gpu(uuid=f"slot-{i}", index=i, type="slot") for i in range(2)]
        return agent_pb2.DescribeResponse(
            contract_version=self.version,
            agent_id="op-node",
            node_name="op-node",
            node_address="127.0.0.1:1",
            gpus=gpus,
            highest_term=self.highest_term,
        )

    async def Apply(self, request: agent_pb2.ApplyRequest, context: Any) -> agent_pb2.ApplyResponse:
        await require_role(context, "operator")
        self.directives.append(request.directive)
        return agent_pb2.ApplyResponse(accepted=agent_pb2.ApplyResponse.Accepted())

    async def Watch(self, request: Any, context: Any) -> Any:
        await require_role(context, "operator")
        while self.version == CONTRACT_VERSION:
            report = agent_pb2.NodeReport(agent_id="op-node", highest_term=self.highest_term, host_connected=True)
            report.observed_at.GetCurrentTime()
            if self.directives:
                d = self.directives[-1]
                report.applied_generation, report.applied_operation_id, report.epoch = d.generation, d.operation_id, 3
                for g in d.layout:
                    g.epoch = 3
                    said = report.groups.add(group=g, state=types_pb2.GROUP_STATE_OPEN)
                    if self.slower:
                        self.serial += 1
                        said.steps_serial = self.serial
                        took = self.slower * PROFILE.decode_ms(g.tp_size, 4, 200)
                        said.steps.add(phase="decode", batch=4, context=200, mean_ms=took, count=20)
                for e in d.residency:
                    report.engines.add(engine=e, state=agent_pb2.EngineReport.STATE_PARKED)
                for p in d.pools:
                    report.models.append(self.facts(p.model))
            yield agent_pb2.WatchResponse(contract_version=CONTRACT_VERSION, report=report)
            await asyncio.sleep(0.2)


class ListeningGateway(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self) -> None:
        self.silent = False
        self.routes: list[gateway_pb2.ApplyRoutesRequest] = []

    async def Describe(self, request: Any, context: Any) -> gateway_pb2.DescribeResponse:
        await require_role(context, "operator")
        return gateway_pb2.DescribeResponse(contract_version=CONTRACT_VERSION, gateway_id="gw")

    async def ApplyRoutes(self, request: gateway_pb2.ApplyRoutesRequest, context: Any) -> gateway_pb2.ApplyRoutesResponse:
        await require_role(context, "operator")
        self.routes.append(request)
        return gateway_pb2.ApplyRoutesResponse(accepted=gateway_pb2.ApplyRoutesResponse.Accepted())

    async def Watch(self, request: Any, context: Any) -> Any:
        while True:
            report = gateway_pb2.DemandReport(
                gateway_id="gw", window_s=1, routes_generation=self.routes[-1].generation if self.routes else 0
            )
            report.window_end.GetCurrentTime()
            pool = types_pb2.PoolRef(name="default/op-chat")
            report.tiers.add(pool=pool, tier="interactive", arrivals=2, finished=2, met_all=1)
            if not self.silent:
                yield gateway_pb2.WatchResponse(contract_version=CONTRACT_VERSION, report=report)
            await asyncio.sleep(0.5)


Kubectl = Callable[..., str]


@pytest.fixture
def ctl(request: pytest.FixtureRequest) -> Kubectl:
    """kubectl as the administrator; `TEST_KUBECONFIG` names a server on which the chart is installed already."""
    own = os.environ.get("TEST_KUBECONFIG")
    if own is None:
        request.getfixturevalue("installed")
    kubeconfig = own or str(request.getfixturevalue("admin_kubeconfig"))

    def command(*args: str, stdin: str = "") -> str:
        done = subprocess.run(["kubectl", "--kubeconfig", kubeconfig, *args], input=stdin, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(args)}: {done.stderr}"
        return done.stdout

    command.kubeconfig = kubeconfig  # type: ignore[attr-defined]
    return command


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def operator(ctl: Kubectl, tmp_path: Path) -> Iterator[Start]:
    """Starts one more; `config` is its file, keywords are added to its environment."""
    token = ctl("-n", NAMESPACE, "create", "token", "nitsum-operator").strip()
    config = yaml.safe_load(Path(ctl.kubeconfig).read_text())  # type: ignore[attr-defined]
    config["users"][0]["user"] = {"token": token}
    path = tmp_path / "operator.kubeconfig"
    path.touch(0o600)
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nitsum_operator.main", "--namespace", NAMESPACE, "--kubeconfig", str(path), "--health-port", "0"]
    started: list[subprocess.Popen[bytes]] = []

    def start(config: dict[str, Any] | None = None, **environment: str) -> subprocess.Popen[bytes]:
        if config is not None:
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
            command.extend(["--config", str(tmp_path / "config.yaml")])
        with (tmp_path / "operator.log").open("ab") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment))
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)
    print((tmp_path / "operator.log").read_text()[-8000:])


async def until(probe: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := await asyncio.to_thread(probe):
            return found
        await asyncio.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {what}")


def status(ctl: Kubectl, name: str = "op-chat") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ctl("get", "servingpool", name, "-o", "json")).get("status", {})
    return found


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in found.get("conditions", []) if c["type"] == kind), {})


def events(ctl: Kubectl, name: str = "op-chat") -> dict[str, list[str]]:
    """Types of a pool's Events, by reason."""
    found: dict[str, list[str]] = {}
    for e in json.loads(ctl("get", "events", "--field-selector", f"involvedObject.name={name}", "-o", "json"))["items"]:
        found.setdefault(e["reason"], []).append(e["type"])
    return found


@contextlib.asynccontextmanager
async def announced(ctl: Kubectl, tmp_path: Path) -> AsyncIterator[tuple[ObedientAgent, ListeningGateway]]:
    """An agent and a gateway with the certificates that the operator issued, found through EndpointSlices. Ends with no pool left."""

    def secret(name: str) -> dict[str, str]:
        listed = json.loads(ctl("-n", NAMESPACE, "get", "secrets", "-o", "json"))["items"]
        return next((s["data"] for s in listed if s["metadata"]["name"] == name), {})

    # The API server refuses loopback addresses in EndpointSlices.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("192.0.2.1", 9))
        host = s.getsockname()[0]

    async def serve(role: str) -> tuple[grpc.aio.Server, int]:
        tls = tmp_path / role
        tls.mkdir()
        for name, value in (await until(lambda: secret(f"nitsum-{role}-tls"), f"the {role}'s certificate")).items():
            (tls / name).write_bytes(base64.b64decode(value))
        server = grpc.aio.server()
        return server, server.add_secure_port(f"{host}:0", server_credentials(tls))

    def slice_of(service: str, ports: list[dict[str, Any]]) -> str:
        meta = {"name": f"op-test-{service}", "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": service}}
        found = [{"addresses": [host], "nodeName": "op-node", "conditions": {"ready": True}}]
        kind = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4"}
        return json.dumps({**kind, "metadata": meta, "ports": ports, "endpoints": found})

    agent, gateway = ObedientAgent(), ListeningGateway()
    server, port = await serve("agent")
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, server)
    await server.start()
    front, front_port = await serve("gateway")
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, front)
    await front.start()
    try:
        ctl("apply", "-f", "-", stdin=slice_of("nitsum-agents", [{"name": "agent", "port": port}, {"name": "node", "port": 1}]))
        ctl("apply", "-f", "-", stdin=slice_of("nitsum-gateways", [{"name": "gateway", "port": front_port}]))
        yield agent, gateway
    finally:
        await server.stop(0)
        await front.stop(0)
        ctl("-n", NAMESPACE, "delete", "endpointslice", "op-test-nitsum-agents", "op-test-nitsum-gateways", "--ignore-not-found")
        ctl("delete", "servingpool", "op-chat", "op-second", "--ignore-not-found")


async def test_pool_to_directive_to_status(ctl: Kubectl, operator: Start, tmp_path: Path) -> None:
    process = operator()
    async with announced(ctl, tmp_path) as (agent, gateway):
        ctl("apply", "-f", "-", stdin=json.dumps(POOL))
        await until(lambda: agent.directives, "a directive")
        first = agent.directives[0]
        assert first.term > 7, "a leader takes a term above all that its agents have seen"
        assert [p.pool.name for p in first.pools] == ["default/op-chat"]
        assert {e.tp_size for e in first.residency} == {1, 2}, "every allowed TP is kept warm"
        found = await until(lambda: condition(s := status(ctl), "Ready").get("status") == "True" and s, "Ready")
        assert found["layout"] in ("2xTP1", "1xTP2")
        assert found["gpus"]["summary"] == "2/2"
        assert found["plan"]["profileOrigin"] == "modelled"
        assert found["layout"] in ctl("get", "servingpools")
        served = await until(lambda: next((r.pools[0] for r in gateway.routes if r.pools and r.pools[0].nodes), None), "routes")
        host, _, port = served.nodes[0].address.partition(":")
        assert (port, served.nodes[0].groups[0].epoch) == ("1", 3)
        assert host != "127.0.0.1", "gateways go where its EndpointSlice says, not where the agent says"
        await until(lambda: status(ctl).get("attainment") == "50.0%", "what gateways report")
        count = len(gateway.routes)
        await asyncio.sleep(4)
        assert len(gateway.routes) == count, "equal routes are not sent again"
        assert len(agent.directives) == 1, "nothing changed, so nothing is sent again"
        assert json.loads(ctl("get", "servingnode", "op-node", "-o", "json"))["status"]["gpuCount"] == 2

        said = await until(lambda: {"Accepted", "LayoutPlanned", "Serving"} <= set(s := events(ctl)) and s, "Events")
        described = ctl("describe", "servingpool", "op-chat")
        assert all(r in described.partition("Events:")[2] for r in said), "where people look"

        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "op-node"}}
        ctl("apply", "-f", "-", stdin=json.dumps(node))
        ctl("taint", "node", "op-node", "nitsum.io/drain=:NoSchedule")
        drained = await until(lambda: (c := condition(status(ctl), "Degraded")).get("reason") == "Draining" and c, "the taint")
        assert "nitsum.io/drain" in drained["message"]
        assert json.loads(ctl("get", "servingnode", "op-node", "-o", "json"))["status"]["draining"]
        ctl("taint", "node", "op-node", "nitsum.io/drain-")
        await until(lambda: condition(status(ctl), "Degraded").get("reason") == "Healthy", "the taint is gone")
        ctl("delete", "node", "op-node")
        assert len(agent.directives) == 1, "it is the only node, so all stayed"
        said = await until(lambda: {"Draining", "Healthy"} <= set(s := events(ctl)) and s, "Events of both")

        process.kill()
        process.wait()
        operator()
        term = status(ctl)["term"]
        await until(lambda: status(ctl)["term"] > term, "the next leader, once the Lease has run out", 40)
        assert len(agent.directives) == 1, "a new leader adopts what runs"
        assert events(ctl) == said, "and says nothing again"

        ctl("patch", "servingpool", "op-chat", "--type=merge", "-p", '{"spec":{"tensorParallel":{"allowed":[1,2,4]}}}')
        wrong = await until(lambda: (c := condition(status(ctl), "Accepted")).get("status") == "False" and c, "Accepted=False")
        assert wrong["reason"] == "IllegalTensorParallel"
        await until(lambda: events(ctl).get("IllegalTensorParallel") == ["Warning"], "a Warning")
        assert condition(status(ctl), "Ready")["status"] == "True", "what ran before stays"
        assert len(agent.directives) == 1

        edited = {"model": {"source": {"path": "/models/missing"}}, "tensorParallel": {"allowed": [1, 2]}}
        good = status(ctl)["accepted"]
        ctl("patch", "servingpool", "op-chat", "--type=merge", "-p", json.dumps({"spec": edited}))
        wrong = await until(
            lambda: (c := condition(status(ctl), "Accepted")).get("reason") == "UnsupportedModel" and c, "a path that is not there"
        )
        assert wrong["status"] == "False"
        assert "/models/missing" in wrong["message"]
        assert f"Generation {good['generation']} stays in force" in wrong["message"]
        await asyncio.sleep(2)
        found = status(ctl)
        assert (found["accepted"], condition(found, "Ready")["status"]) == (good, "True"), "what ran before stays"
        assert len(agent.directives) == 1
        assert {r.pools[0].model.source.path for r in gateway.routes if r.pools} == {"/models/tiny"}
        agent.missing.clear()
        await until(lambda: len(agent.directives) == 2, "it is read again, and found good", 20)
        assert agent.directives[1].pools[0].model.source.path == "/models/missing"
        await until(lambda: condition(status(ctl), "Accepted")["status"] == "True", "Accepted")

        # No GPU is free for it, and yet it is known what is wrong with it.
        second = {**POOL["spec"], "model": {"name": "second", "source": {"path": "/models/second"}}, "tensorParallel": {"allowed": [4]}}
        second |= {"budget": {"gpus": 4}}
        ctl("apply", "-f", "-", stdin=json.dumps(POOL | {"metadata": {"name": "op-second", "namespace": "default"}, "spec": second}))
        illegal = await until(lambda: (c := condition(status(ctl, "op-second"), "Accepted")).get("status") == "False" and c, "a judgement")
        assert (illegal["reason"], "legal are 1, 2" in illegal["message"]) == ("IllegalTensorParallel", True)
        ctl("delete", "servingpool", "op-second")

        ctl("delete", "servingpool", "op-chat")
        await until(lambda: len(agent.directives) == 3, "the directive that ends it")
        assert not agent.directives[2].layout


async def test_step_times_are_learned_and_silence_keeps_the_plan(ctl: Kubectl, operator: Start, tmp_path: Path) -> None:
    ctl("-n", NAMESPACE, "delete", "lease", "nitsum-operator", "--ignore-not-found")
    operator(config={"planner": {"staleAfterSeconds": 3}})
    async with announced(ctl, tmp_path) as (agent, gateway):
        agent.slower = 1.5
        ctl("apply", "-f", "-", stdin=json.dumps(POOL))
        learned = lambda: (s := status(ctl)).get("plan", {}).get("profileOrigin", "").startswith("modelled, corrected by") and s  # noqa: E731
        found = await until(learned, "a corrected profile")
        assert "interactive" in found["plan"]["serving"]
        gateway.silent = True
        late = lambda: (s := status(ctl))["plan"].get("held", "").startswith("no fresh demand report") and s  # noqa: E731
        held = await until(late, "that demand is not known")
        count = len(agent.directives)
        await asyncio.sleep(3)
        assert (status(ctl)["layout"], len(agent.directives)) == (held["layout"], count), "layout, labels and limits stay"
        gateway.silent = False
        await until(lambda: "held" not in status(ctl)["plan"], "that it is known again")


async def test_killed_at_every_point_and_then_deposed(ctl: Kubectl, operator: Start, tmp_path: Path) -> None:
    """One change of a spec is carried through three deaths of the operator; then a leader that was only asleep comes back."""

    def lead(fault: FaultPoint | None = None) -> subprocess.Popen[bytes]:
        # What a new leader has to wait for is tested above; here the dead one's Lease goes at once.
        ctl("-n", NAMESPACE, "delete", "lease", "nitsum-operator", "--ignore-not-found")
        return operator(**({"NITSUM_FAULT": str(fault)} if fault else {}))

    process = lead()
    async with announced(ctl, tmp_path) as (agent, _):
        ctl("apply", "-f", "-", stdin=json.dumps(POOL))
        await until(lambda: condition(status(ctl), "Ready").get("status") == "True", "Ready")
        process.kill()
        process.wait()
        count, generation = len(agent.directives), status(ctl)["observedGeneration"]
        ctl("patch", "servingpool", "op-chat", "--type=merge", "-p", '{"spec":{"tensorParallel":{"allowed":[2]}}}')
        for point, sent in (
            (FaultPoint.OPERATOR_PLANNED, 0),
            (FaultPoint.OPERATOR_INTENT_WRITTEN, 0),
            (FaultPoint.OPERATOR_HALF_SENT, 1),
        ):
            assert await asyncio.to_thread(lead(point).wait, 40) == -signal.SIGKILL, point
            assert len(agent.directives) - count == sent, point
            seen = status(ctl)
            assert (seen["observedGeneration"] == generation) == (point is FaultPoint.OPERATOR_PLANNED), "intent before execution"
        asleep = lead()
        found = await until(lambda: (s := status(ctl)).get("layout") == "1xTP2" and condition(s, "Ready")["status"] == "True" and s, "TP 2")
        assert len(agent.directives) - count == 1, "the one that was half sent is what runs: it is not sent again"
        terms = [d.term for d in agent.directives]
        assert terms == sorted(terms)

        asleep.send_signal(signal.SIGSTOP)
        lead()
        newer = await until(lambda: (s := status(ctl))["term"] > found["term"] and s, "a newer leader")
        asleep.send_signal(signal.SIGCONT)
        ctl("patch", "servingpool", "op-chat", "--type=merge", "-p", '{"spec":{"tensorParallel":{"allowed":[1]}}}')
        await until(lambda: status(ctl).get("layout") == "2xTP1", "the newer one's directive")
        await asyncio.sleep(3)
        assert {d.term for d in agent.directives[count + 1 :]} == {newer["term"]}, "the older one gives no more directives"
        assert status(ctl)["term"] == newer["term"], "and writes no status"
        ctl("patch", "servingpool", "op-chat", "--subresource=status", "--type=merge", "-p", '{"status":{"layout":"by hand"}}')
        await until(lambda: status(ctl).get("layout") == "2xTP1", "what people write into status is written over")

        second = POOL | {"metadata": {"name": "op-second", "namespace": "default"}}
        ctl("apply", "-f", "-", stdin=json.dumps(second))
        taken = await until(lambda: (c := condition(status(ctl, "op-second"), "Accepted")) and c, "a judgement of the second pool")
        assert (taken["status"], taken["reason"]) == ("False", "ModelNameTaken")
        assert "default/op-chat" in taken["message"]
        ctl("delete", "servingpool", "op-second")

        count = len(agent.directives)
        agent.version = "another"
        found = await until(
            lambda: (c := condition(status(ctl), "AgentsConnected")).get("reason") == "ContractVersionMismatch" and c, "the mismatch"
        )
        assert "bring both to one release" in found["message"]
        ctl("patch", "servingpool", "op-chat", "--type=merge", "-p", '{"spec":{"tensorParallel":{"allowed":[2]}}}')
        await asyncio.sleep(2)
        assert len(agent.directives) == count, "it is left alone"
        agent.version = CONTRACT_VERSION
        await until(lambda: status(ctl).get("layout") == "1xTP2", "what was wanted meanwhile")
