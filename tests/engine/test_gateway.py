"""The real gateway process, TLS and SGLang front included, over fake nodes: what clients see while streams move, nodes break and refuse."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from nitsum_api import CONTRACT_VERSION
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.node.v1 import node_pb2
from nitsum_api.security import Identity, secure_channel
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.stock import free_port

from .fake_node import FakeNode

MODEL = "tiny"
POOL = types_pb2.PoolRef(name="default/chat", uid="u1")
TIERS = [types_pb2.Tier(name="fast", ttft_ms=5000, tpot_ms=500, is_default=True), types_pb2.Tier(name="batch")]
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


class Gateway:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.control_port, self.generation = folder, free_port(), free_port(), 0
        ca = new_ca()
        for role in ("operator", "host", "gateway"):
            d = folder / role
            d.mkdir()
            for name, data in issue(ca, Identity(role, "test"), ("localhost",)).items():
                (d / name).write_bytes(data)
        flags = f"--listen 127.0.0.1:{self.port} --control-listen 127.0.0.1:{self.control_port} --tls-dir {folder}/gateway"
        with (folder / "gateway.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nitsum_gateway.main", *flags.split(), "--state-dir", f"{folder}/state", "--gateway-id", "gw"],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def client(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.folder / "gateway" / "ca.crt"))
        return httpx.AsyncClient(base_url=f"https://localhost:{self.port}", verify=context, timeout=60)

    def logs(self) -> str:
        return "".join(f"--- {p.name}\n{p.read_text(errors='replace')[-4000:]}" for p in sorted(self.folder.rglob("*.log")))

    async def control(self, nodes: list[FakeNode], **fields: Any) -> gateway_pb2.ApplyRoutesResponse:
        self.generation += 1
        routes = [
            gateway_pb2.NodeRoute(
                address=f"127.0.0.1:{n.port}",
                tls_name="host.nitsum.internal",
                agent_id=f"a{i}",
                groups=[types_pb2.Group(group_id=n.group_id, epoch=n.epoch, pool=POOL)],
            )
            for i, n in enumerate(nodes)
        ]
        model = types_pb2.Model(name=MODEL, source=types_pb2.ModelSource(path=str(tiny_llama())))
        pool = gateway_pb2.PoolRoute(pool=POOL, model=model, tiers=TIERS, nodes=routes)
        values = {"contract_version": CONTRACT_VERSION, "term": 3, "generation": self.generation, "pools": [pool]} | fields
        async with secure_channel(f"127.0.0.1:{self.control_port}", "gateway", self.folder / "operator") as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            return await stub.ApplyRoutes(gateway_pb2.ApplyRoutesRequest(**values), timeout=60, wait_for_ready=True)

    async def demand(self, seconds: float = 2.5) -> dict[str, gateway_pb2.TierDemand]:
        got: dict[str, gateway_pb2.TierDemand] = {}
        async with secure_channel(f"127.0.0.1:{self.control_port}", "gateway", self.folder / "operator") as channel:
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Watch(
                gateway_pb2.WatchRequest(contract_version=CONTRACT_VERSION, interval_ms=200)
            )
            try:
                async with asyncio.timeout(seconds):
                    async for answer in call:
                        for row in answer.report.tiers:
                            if row.tier in got:
                                got[row.tier].arrivals += row.arrivals
                                got[row.tier].finished += row.finished
                                got[row.tier].met_all += row.met_all
                            else:
                                got[row.tier] = row
            except TimeoutError:
                pass
        return got


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    g = Gateway(tmp_path_factory.mktemp("gw"))
    try:
        node = await FakeNode(g.folder / "host").start()
        await g.control([node])
        deadline = time.monotonic() + 150
        async with g.client() as client:
            while True:
                assert time.monotonic() < deadline, g.logs()
                assert g.process.poll() is None, g.logs()
                try:
                    r = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "max_tokens": 2})
                    if r.status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.3)
        await node.stop()
        yield g
    finally:
        g.process.send_signal(signal.SIGTERM)
        try:
            g.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(g.process.pid, signal.SIGKILL)
            raise


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[str, str, int]:
    """Text, finish reason, completion tokens."""
    text, finish, tokens = "", "", 0
    body = {"model": MODEL, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    async with client.stream("POST", path, json=body, headers=headers) as r:
        assert r.status_code == 200, (await r.aread()).decode()
        async for line in r.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for c in event["choices"]:
                text += c.get("text") or c.get("delta", {}).get("content") or ""
                finish = c["finish_reason"] or finish
    return text, finish, tokens


CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 60})
COMPLETION = ("/v1/completions", {"prompt": "hello there", "max_tokens": 60})


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nodes_end() -> AsyncIterator[None]:
    yield
    await asyncio.gather(*(n.stop() for n in FakeNode.started))
    FakeNode.started.clear()


async def use(g: Gateway, *nodes: FakeNode) -> None:
    """Routes to these nodes alone, and waits until streams take them."""
    assert (await g.control(list(nodes))).HasField("accepted")


@pytest.mark.parametrize("request_", [CHAT, COMPLETION], ids=["chat", "completion"])
async def test_a_moved_stream_equals_one_that_did_not_move(gateway: Gateway, request_: tuple[str, dict[str, Any]]) -> None:
    still = await FakeNode(gateway.folder / "host").start()
    await use(gateway, still)
    async with gateway.client() as client:
        expected = await stream(client, *request_)
        assert expected[1:] == ("length", 60)
        moving = await FakeNode(gateway.folder / "host", group_id="m-0", move_after=7, to="m-1", epoch=2).start()
        await use(gateway, moving)
        assert await asyncio.gather(*(stream(client, *request_) for _ in range(4))) == [expected] * 4
    assert sorted(s.resume_k for s in moving.submits) == [0] * 4 + [6] * 4
    assert {s.group_id for s in moving.submits if s.resume_k} == {"m-1"}


async def test_a_node_that_dies_loses_no_token(gateway: Gateway) -> None:
    a, b = [await FakeNode(gateway.folder / "host", group_id=f"d-{i}", step_s=0.02).start() for i in range(2)]
    await use(gateway, a, b)
    async with gateway.client() as client:
        expected = await stream(client, *COMPLETION)
        a.submits.clear(), b.submits.clear()
        running = [asyncio.create_task(stream(client, *COMPLETION)) for _ in range(4)]
        await asyncio.sleep(0.6)
        victim = max((a, b), key=lambda n: len(n.submits))
        assert victim.submits
        await victim.stop()
        assert await asyncio.gather(*running) == [expected] * 4


async def test_refusals_reach_the_client_as_openai_errors(gateway: Gateway) -> None:
    full = await FakeNode(gateway.folder / "host", group_id="f-0", refuse=node_pb2.Refused.REASON_FULL).start()
    await use(gateway, full)
    async with gateway.client() as client:
        for extra in ({}, {"stream": True}):
            for path, body in (CHAT, COMPLETION):
                r = await client.post(path, json={"model": MODEL, **body, **extra})
                assert r.status_code == 429, (path, extra, r.text)
                assert int(r.headers["retry-after"]) >= 1
                assert "full" in r.json()["error"]["message"]
        full.refuse = node_pb2.Refused.REASON_TOO_LONG
        r = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
        assert (r.status_code, r.json()["error"]["message"]) == (400, "as the test says")


async def test_bad_requests(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host").start()
    await use(gateway, node)
    async with gateway.client() as client:
        for body, status, code in (
            ({"model": "nobody", "prompt": "x"}, 404, "model_not_found"),
            ({"model": MODEL, "prompt": "x", "max_tokens": 5000}, 400, "context_length_exceeded"),
            ({"model": MODEL, "prompt": "x", "service_tier": "gold"}, 400, "unknown_tier"),
            ({"model": MODEL, "prompt": "x", "rid": "abc"}, 400, "unknown_parameter"),
            ({"model": MODEL, "prompt": "x", "custom_params": {"nitsum_tier": "fast"}}, 400, "unknown_parameter"),
            ({"model": MODEL, "prompt": "x", "temperature": -1}, 400, None),
            ({"model": MODEL, "prompt": "x", "max_tokens": 10**30}, 400, None),
        ):
            r = await client.post("/v1/completions", json=body)
            assert r.status_code == status, (body, r.status_code, r.text)
            if code:
                assert r.json()["error"]["code"] == code, r.text
        for path in ("/flush_cache", "/pause_generation", "/get_server_info", "/generate"):
            assert (await client.post(path, json={})).status_code == 404
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == [MODEL]
        assert (await client.post("/tokenize", json={"model": MODEL, "prompt": "hello"})).json()["count"] > 0
        assert (await stream(client, *COMPLETION))[2] == 60


async def test_tiers_and_demand(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host").start()
    await use(gateway, node)
    async with gateway.client() as client:
        await asyncio.sleep(1.5)  # what earlier tests did is reported
        watching = asyncio.create_task(gateway.demand(4))
        await asyncio.sleep(0.5)
        node.submits.clear()
        await stream(client, *COMPLETION)
        await stream(client, COMPLETION[0], {**COMPLETION[1], "service_tier": "fast"}, {"x-nitsum-tier": "batch"})
        assert [s.tier for s in node.submits] == ["fast", "batch"]
        assert [s.admission for s in node.submits] == [types_pb2.ADMISSION_FEASIBLE, types_pb2.ADMISSION_BACKGROUND]
        seen = await watching
        assert all(d.ttft_ms.sum >= 0 for d in seen.values())
        assert 'nitsum_gateway_arrivals_total{pool="default/chat",tier="batch"}' in (await client.get("/metrics")).text
        assert {t: (d.arrivals, d.finished) for t, d in seen.items()} == {"fast": (1, 1), "batch": (1, 1)}


async def test_a_client_that_leaves_is_aborted_at_the_node(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host", step_s=0.05).start()
    await use(gateway, node)
    async with gateway.client() as client:
        task = asyncio.create_task(stream(client, COMPLETION[0], {**COMPLETION[1], "max_tokens": 2000}))
        while not node.submits:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        task.cancel()
        async with asyncio.timeout(20):
            while not node.aborted:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


async def test_a_lower_term_and_a_stale_generation_are_refused(gateway: Gateway) -> None:
    Rejected = gateway_pb2.ApplyRoutesResponse.Rejected
    node = FakeNode(gateway.folder / "host", port=1)
    await gateway.control([node])
    assert (await gateway.control([node], term=2)).rejected.reason == Rejected.REASON_STALE_TERM
    assert (await gateway.control([node], generation=1)).rejected.reason == Rejected.REASON_STALE_GENERATION
    assert (await gateway.control([node], contract_version="v0")).rejected.reason == Rejected.REASON_CONTRACT_VERSION


async def test_a_front_that_dies_is_started_again(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host").start()
    await use(gateway, node)
    os.kill(_front_of(gateway.process.pid), signal.SIGKILL)
    async with gateway.client() as client:
        statuses, deadline = [], time.monotonic() + 60
        while not statuses or statuses[-1] != 200 or len(set(statuses)) < 2:
            assert time.monotonic() < deadline, (statuses, gateway.logs())
            statuses.append((await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2})).status_code)
            await asyncio.sleep(0.2)
    assert set(statuses) == {200, 503}


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _front_of(gateway_pid: int) -> int:
    (zygote,) = _children(gateway_pid)
    (front,) = [c for c in _children(zygote) if Path(f"/proc/{c}/cmdline").read_bytes().startswith(b"nitsum-front")]
    return front
