"""The real gateway process, TLS and SGLang front included, over fake nodes: what clients see while streams move, nodes break and refuse."""

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings

from nitsum_api import CONTRACT_VERSION
from nitsum_api.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.node.v1 import node_pb2
from nitsum_api.security import Identity, secure_channel
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.ports import free_ports

from . import hostile
from .fake_node import FakeNode

MODEL, CONTEXT = "tiny", 4096
FUZZ_EXAMPLES = int(os.environ.get("NITSUM_FUZZ_EXAMPLES", "200"))
POOL = types_pb2.PoolRef(name="default/chat", uid="u1")
TIERS = [types_pb2.Tier(name="fast", ttft_ms=5000, tpot_ms=500, is_default=True), types_pb2.Tier(name="batch")]
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


class Gateway:
    def __init__(self, folder: Path) -> None:
        self.folder, self.generation = folder, 0
        self.port, self.control_port = free_ports(2)
        ca = new_ca()
        for role in ("operator", "host", "gateway"):
            d = folder / role
            d.mkdir()
            for name, data in issue(ca, Identity(role, "test"), ("localhost",)).items():
                (d / name).write_bytes(data)
        self.start()

    def start(self) -> None:
        folder = self.folder
        flags = f"--listen 127.0.0.1:{self.port} --control-listen 127.0.0.1:{self.control_port} --tls-dir {folder}/gateway"
        with (folder / "gateway.log").open("ab") as log:
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
        assert r.json()["error"]["code"] == "context_length_exceeded"


async def test_an_error_after_the_first_token_names_nothing_of_ours(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host", fail_after=4).start()
    await use(gateway, node)
    async with gateway.client() as client:
        for path, body in (CHAT, COMPLETION):
            async with client.stream("POST", path, json={"model": MODEL, **body, "stream": True}) as r:
                assert r.status_code == 200
                lines = [line async for line in r.aiter_lines() if line]
            errors = [json.loads(x[6:])["error"] for x in lines if x.startswith('data: {"error"')]
            assert [e["message"] for e in errors] == ["the server failed on this request"], lines
            assert len(lines) > 3
            assert lines[-1] == "data: [DONE]", "SGLang ends such a stream so"


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
        hello = [{"role": "user", "content": "x"}]
        for body, field in (
            ({}, "messages"), ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0]"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0]"), ({"messages": hello, "stream_options": "x"}, "stream_options"),
            ({"messages": hello, "tools": [{"type": "function"}]}, "tools[0]"), ({"messages": hello, "tool_choice": 7}, "tool_choice"),
        ):  # fmt: skip
            r = await client.post("/v1/chat/completions", json={"model": MODEL, **body})
            assert r.status_code == 400, (body, r.text)
            assert r.json()["error"]["param"].startswith(field), r.text
            assert not [leak for leak in ("File", ".py", "nitsum", "custom_params", "'loc'", "pydantic") if leak in r.text], r.text
        for path in (
            "/flush_cache", "/pause_generation", "/get_server_info", "/generate", "/v1/embeddings", "/v1/responses", "/v1/messages",
            "/v1/../flush_cache", "//flush_cache", "/v1/completions/../../abort_request", "/v1/chat/completions%00", "/docs",
        ):  # fmt: skip
            r = await client.post(path, json={})
            assert (r.status_code, r.json()["error"]["code"]) == (404, "not_found"), (path, r.text)
        for method, path in (
            ("GET", "/v1/completions"),
            ("PUT", "/v1/chat/completions"),
            ("OPTIONS", "/v1/models"),
            ("POST", "/v1/models"),
        ):
            r = await client.request(method, path)
            assert (r.status_code, r.json()["error"]["code"]) == (405, "method_not_allowed"), (method, path, r.text)
        assert (await client.head("/v1/models")).status_code == 200
        assert [(await client.get(p)).status_code for p in ("/healthz", "/readyz")] == [200, 200]
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == [MODEL]
        assert (await client.post("/tokenize", json={"model": MODEL, "prompt": "hello"})).json()["count"] > 0
        assert (await stream(client, *COMPLETION))[2] == 60


async def test_no_request_reaches_private_fields_or_ends_the_front(gateway: Gateway) -> None:
    """Hostile bodies through the real listener, allow-list, SGLang server, tokenizer, router and line; the node sees what came through."""
    node = await FakeNode(gateway.folder / "host", step_s=0, longest=6).start()
    await use(gateway, node)
    front = _front_of(gateway.process.pid)
    context = ssl.create_default_context(cafile=str(gateway.folder / "gateway" / "ca.crt"))
    answers: Counter[int] = Counter()

    @settings(max_examples=FUZZ_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile.requests(MODEL))
    def fuzz(client: httpx.Client, request_: tuple[str, bytes]) -> None:
        path, body = request_
        r = client.post(path, content=body, headers={"content-type": "application/json"})
        answers[r.status_code] += 1
        if r.status_code != 200:
            assert r.status_code in (400, 404, 413), (path, body[:400], r.status_code, r.text[:400])
            assert set(r.json()["error"]) == {"message", "type", "param", "code"}, (path, body[:400], r.text[:400])
        for line in r.text.splitlines():
            if line.startswith("data: {") and (e := json.loads(line[6:]).get("error")):
                assert e["code"] == 400, (path, body[:400], line[:400])

    def run() -> None:
        with httpx.Client(base_url=f"https://localhost:{gateway.port}", verify=context, timeout=60) as client:
            fuzz(client)

    await asyncio.to_thread(run)
    assert answers[200] > FUZZ_EXAMPLES // 20, answers
    assert answers[400] > FUZZ_EXAMPLES // 20, answers
    assert node.submits
    for s in node.submits:
        assert s.tier in ("fast", "batch")
        assert (s.resume_k, s.suspect, s.queue_ms) == (0, False, 0)
        assert s.input_ids
        assert len(s.input_ids) + s.sampling.max_new_tokens <= CONTEXT + 1
        assert 0 <= s.sampling.temperature <= 2
        assert s.logprobs.top <= 20
        assert len(s.cache_salt) <= 256
        assert not s.sampling.stop_regex
        assert all(abs(b) <= 100 for b in s.sampling.logit_bias.values())
    assert _front_of(gateway.process.pid) == front
    async with gateway.client() as client:
        assert (await stream(client, *COMPLETION))[1] == "stop"


async def test_idle_connections_outlive_their_clients_patience(gateway: Gateway) -> None:
    """httpx, and OpenAI's client with it, uses a connection again for 5 s; who closes it at 5 s loses the request that crosses. Here one
    idles for longer at both hops: at the listener, and at the front, past the 5 s after which SGLang's server would close it."""
    front = _front_of(gateway.process.pid)
    port = next(c.laddr.port for c in psutil.Process(front).net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    context = ssl.create_default_context(cafile=str(gateway.folder / "gateway" / "ca.crt"))
    hops = [
        await asyncio.open_connection("localhost", gateway.port, ssl=context, server_hostname="localhost"),
        await asyncio.open_connection("127.0.0.1", port),
    ]
    for wait_s in (0, 6):
        await asyncio.sleep(wait_s)
        for reader, writer in hops:
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]
    for _, writer in hops:
        writer.close()


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


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"stream": True, "n": 3}, {"n": 3}], ids=["whole", "stream", "stream-n", "n"])
@pytest.mark.parametrize("to", ["", "q-1"], ids=["queued", "moved-into-a-queue"])
async def test_a_client_that_leaves_a_queue_is_aborted_there(gateway: Gateway, body: dict[str, Any], to: str) -> None:
    """It has seen no byte yet, or a stream that stands still in the middle of a move."""
    node = await FakeNode(gateway.folder / "host", group_id="q-0", hold=True, to=to, move_after=3 if to else 0).start()
    await use(gateway, node)
    n = int(body.get("n", 1))
    async with gateway.client() as client:
        task = asyncio.create_task(client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 50, **body}))
        async with asyncio.timeout(20):
            while sum(s.group_id == (to or "q-0") for s in node.submits) < n:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        task.cancel()
        async with asyncio.timeout(20):
            while len(node.aborted) < n:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            while not re.search(  # noqa: ASYNC110
                r'nitsum_gateway_in_flight{pool="default/chat",tier="fast"} 0.0', (await client.get("/metrics")).text
            ):
                await asyncio.sleep(0.2)


async def test_one_refused_choice_ends_its_siblings(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host", group_id="s-0", refuse=node_pb2.Refused.REASON_FULL, refuse_after=2, step_s=0.05).start()
    await use(gateway, node)
    async with gateway.client() as client:
        for extra in ({}, {"stream": True}):
            node.submits.clear(), node.aborted.clear()
            r = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1000, "n": 3, **extra})
            assert r.status_code == 429 or '"error"' in r.text, (extra, r.status_code, r.text[-500:])
            assert 'finish_reason":"length' not in r.text
            async with asyncio.timeout(20):
                while len(node.aborted) < 2:  # noqa: ASYNC110
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


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _front_of(gateway_pid: int) -> int:
    (zygote,) = _children(gateway_pid)
    (front,) = [c for c in _children(zygote) if _command(c).startswith(b"nitsum-front")]
    return front


async def test_a_front_that_dies_in_the_middle_of_a_stream_says_so_and_leaves_nothing_behind(gateway: Gateway) -> None:
    node = await FakeNode(gateway.folder / "host", step_s=0.05).start()
    await use(gateway, node)
    front = _front_of(gateway.process.pid)
    family = [front, *_children(front)]
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2000, "stream": True}
    async with gateway.client() as client, client.stream("POST", "/v1/completions", json=body) as r:
        assert r.status_code == 200
        lines = []
        async for line in r.aiter_lines():
            lines.append(line)
            if len(lines) == 5:
                os.kill(front, signal.SIGKILL)
    assert [json.loads(x[6:])["error"]["code"] for x in lines if "error" in x] == ["stream_broken"]
    assert "data: [DONE]" not in lines
    async with asyncio.timeout(30):
        while any(map(_lives, family)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert not set(family) & set(_children(gateway.process.pid))
    await _serves_again(gateway)
    assert node.attached == 1


@pytest.mark.parametrize("child", ["router", "detokenizer"])
async def test_a_part_of_a_front_that_dies_takes_the_front_along(gateway: Gateway, child: str) -> None:
    node = await FakeNode(gateway.folder / "host").start()
    await use(gateway, node)
    front = _front_of(gateway.process.pid)
    parts = [c for c in _children(front) if b"resource_tracker" not in _command(c)]
    assert len(parts) == 2, [_command(c) for c in parts]
    os.kill(min(parts) if child == "router" else max(parts), signal.SIGKILL)
    async with asyncio.timeout(30):
        while _lives(front):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await _serves_again(gateway)


async def test_a_gateway_started_again_serves_its_last_routes_without_an_operator(gateway: Gateway) -> None:
    """And one that is killed leaves no process."""
    node = await FakeNode(gateway.folder / "host").start()
    await use(gateway, node)
    (zygote,) = _children(gateway.process.pid)
    family = [zygote, *_children(zygote), *_children(_front_of(gateway.process.pid))]
    os.kill(gateway.process.pid, signal.SIGKILL)
    gateway.process.wait()
    gateway.start()
    async with gateway.client() as client, asyncio.timeout(30):
        while True:
            try:
                assert (await client.get("/readyz")).status_code == 503
                break
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
    await _serves_again(gateway, 150)
    async with gateway.client() as client:
        assert (await client.get("/readyz")).status_code == 200
    assert not [pid for pid in family if _lives(pid)]


async def _serves_again(gateway: Gateway, seconds: float = 60) -> None:
    async with gateway.client() as client, asyncio.timeout(seconds):
        while True:
            r = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2})
            if r.status_code == 200:
                return
            assert r.status_code == 503, r.text
            await asyncio.sleep(0.2)
