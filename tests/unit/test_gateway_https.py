"""The dispatcher behind its real listener (TLS), with a stand-in for SGLang's server: slow clients, clients that leave, certificates."""

# ruff: noqa: ASYNC110

import asyncio
import contextlib
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nitsum_api.gateway.v1 import gateway_pb2
from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity
from nitsum_api.types.v1 import types_pb2
from nitsum_gateway import dispatcher, https, main
from nitsum_gateway import fronts as fronts_module
from nitsum_gateway.dispatcher import Dispatcher
from nitsum_gateway.fronts import Front, Fronts

CA = new_ca()


def certify(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in issue(CA, Identity("gateway", "t"), ("localhost",)).items():
        (folder / name).write_bytes(data)


class Upstream:
    """What SGLang's server would be: never answers, and notes who has left."""

    def __init__(self) -> None:
        self.left = 0
        self.hung = asyncio.Event()
        self.bodies: list[Any] = []

    async def hang(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.left += 1
        return Response()

    async def models(self, request: Request) -> Response:
        if self.hung.is_set():
            await asyncio.sleep(60)
        return Response("{}")

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/completions", self.hang, methods=["POST"]), Route("/v1/models", self.models)])


@contextlib.asynccontextmanager
async def serving(config: uvicorn.Config) -> AsyncIterator[int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


def fronts(**by_model: Front) -> Any:
    return SimpleNamespace(by_model=by_model, routed=True)


def front(port: int) -> Front:
    group = types_pb2.Group(group_id="g", epoch=1)
    route = gateway_pb2.PoolRoute(
        model=types_pb2.Model(name="m"),
        tiers=[types_pb2.Tier(name="fast", is_default=True), types_pb2.Tier(name="slow")],
        nodes=[gateway_pb2.NodeRoute(agent_id="a", groups=[group])],
    )
    f = Front(route, f"http://127.0.0.1:{port}", "key", 2048)
    f.ready.set()
    f.served = True
    return f


def trust(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / "ca.crt"))


@contextlib.asynccontextmanager
async def gateway(tls: Path, known: Any) -> AsyncIterator[tuple[int, uvicorn.Config]]:
    certify(tls)
    config = https.config(Dispatcher(known).app(), "127.0.0.1:0", tls, 1)
    async with serving(config) as port:
        yield port, config


def client_of(tls: Path, port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trust(tls))


async def raw(tls: Path, port: int, *pieces: bytes) -> bytes:
    """Sends the pieces one after the other; what comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust(tls), server_hostname="localhost")
    got = b""
    try:
        async with asyncio.timeout(4):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.1)
            while data := await reader.read(4096):
                got += data
    except ConnectionError:
        pass
    finally:
        writer.close()
    return got


@pytest.mark.parametrize(
    "sent", [b"", b"GET /heal", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"], ids=["silent", "half a line", "half a header"]
)
def test_a_client_that_never_finishes_its_headers_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    async def run() -> None:
        monkeypatch.setattr(https, "HEADERS_S", 0.3)
        async with gateway(tmp_path, fronts()) as (port, _):
            assert await raw(tmp_path, port, sent) == b""
            whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
            if sent:  # nor on a connection that was good once
                assert (await raw(tmp_path, port, whole, sent)).startswith(b"HTTP/1.1 200")

    asyncio.run(run())


def test_a_body_that_does_not_come_is_408_and_one_that_is_too_large_413(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(dispatcher, "BODY_S_MAX", 0.3)
        monkeypatch.setattr(dispatcher, "BODY_BYTES_MAX", 1000)
        async with gateway(tmp_path, fronts()) as (port, _):
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            slow = await raw(tmp_path, port, head + b'Content-Length: 100\r\n\r\n{"mod')
            assert slow.startswith(b"HTTP/1.1 408"), slow
            chunked = await raw(
                tmp_path, port, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"258\r\n" + b"x" * 600 + b"\r\n258\r\n" + b"x" * 600
            )
            assert chunked.startswith(b"HTTP/1.1 413"), chunked

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_byte_ends_its_request(tmp_path: Path, stream: bool) -> None:
    async def run() -> None:
        upstream = Upstream()
        config = uvicorn.Config(upstream.app(), log_level="warning", lifespan="off")
        async with serving(config) as up, gateway(tmp_path, fronts(m=front(up))) as (port, _), client_of(tmp_path, port) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": stream}))
            async with asyncio.timeout(5):
                while not upstream.bodies:
                    await asyncio.sleep(0.01)
                task.cancel()
                while not upstream.left:
                    await asyncio.sleep(0.01)
            assert upstream.bodies == [{"model": "m", "prompt": "x", "stream": stream, "custom_params": {"nitsum_tier": "fast"}}]

    asyncio.run(run())


def test_the_tier_that_was_asked_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with gateway(tmp_path, fronts(m=front(1))) as (port, _), client_of(tmp_path, port) as client:
            for tier, header, param in (
                ("gold", None, "service_tier"), (0, None, "service_tier"), ("", None, "service_tier"), ([], None, "service_tier"),
                ("fast", "gold", "x-nitsum-tier"), ("fast", "", "x-nitsum-tier"),
            ):  # fmt: skip
                headers = {} if header is None else {"X-Nitsum-TIER": header}
                r = await client.post("/v1/completions", json={"model": "m", "prompt": "x", "service_tier": tier}, headers=headers)
                assert (r.status_code, r.json()["error"]["code"], r.json()["error"]["param"]) == (400, "unknown_tier", param), (
                    tier,
                    header,
                )
            for tier, header in (("slow", None), (None, None), ("auto", None), ("gold", "slow"), ("gold", "default")):
                headers = {} if header is None else {"X-Nitsum-TIER": header}
                r = await client.post("/v1/completions", json={"model": "m", "prompt": "x", "service_tier": tier}, headers=headers)
                assert (r.status_code, r.json()["error"]["code"], r.headers["retry-after"]) == (
                    503,
                    "not_ready",
                    "1",
                )  # nobody is behind it

    asyncio.run(run())


def test_a_gateway_without_routes_is_not_ready_and_does_not_deny_a_model(tmp_path: Path) -> None:
    async def run() -> None:
        known = SimpleNamespace(by_model={}, routed=False)
        async with gateway(tmp_path, known) as (port, _), client_of(tmp_path, port) as client:
            body = {"model": "m", "prompt": "x"}
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.post("/v1/completions", json=body)).status_code == 503
            known.by_model = {"broken": front(1), "m": front(1)}
            for f in known.by_model.values():
                f.served = False
            known.routed = True
            assert (await client.get("/readyz")).text == "starting: broken, m"
            known.by_model["broken"].problem = "the front ended"
            assert (await client.get("/readyz")).text == "starting: m"
            known.by_model["m"].served = True
            assert (await client.get("/readyz")).status_code == 200, "a pool that cannot start is not the others' trouble"
            known.by_model["new"] = front(1)
            known.by_model["new"].served = False
            assert (await client.get("/readyz")).status_code == 200, "nor is one that starts"
            assert (await client.post("/v1/completions", json=body | {"model": "other"})).json()["error"]["code"] == "model_not_found"

    asyncio.run(run())


def test_a_starting_pool_and_an_unknown_model_are_told_in_one_sentence(tmp_path: Path) -> None:
    async def run() -> None:
        starting = front(1)
        starting.ready.clear()
        starting.problem = 'the front ended; its log ends: Traceback File "/opt/x.py"'
        many = {f"m{i:02}": front(1) for i in range(30)}
        async with gateway(tmp_path, fronts(m=starting, **many)) as (port, _), client_of(tmp_path, port) as client:
            r = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
            assert (r.status_code, r.json()["error"]["message"]) == (503, "the pool is starting; send the request again")
            for r in (
                await client.post("/v1/completions", json={"model": "x" * 100_000, "prompt": "x"}),
                await client.get("/v1/models/" + "x" * 200),
            ):
                assert r.status_code == 404
                said = r.json()["error"]["message"]
                assert "there are: m, m00, m01, m02" in said
                assert said.endswith("m18 and 11 more")
                assert len(said) < 500

    asyncio.run(run())


def test_what_is_not_served_is_told_in_openais_shape(tmp_path: Path) -> None:
    async def run() -> None:
        async with gateway(tmp_path, fronts(m=front(1))) as (port, _), client_of(tmp_path, port) as client:
            for path in (
                "/v1/embeddings",
                "/v1/responses",
                "/v1/messages",
                "/generate",
                "/v1/../flush_cache",
                "//flush_cache",
                "/docs",
                "/%00",
            ):
                r = await client.post(path, json={})
                assert (r.status_code, r.json()["error"]["code"]) == (404, "not_found"), path
            for method, path in (("GET", "/v1/completions"), ("PUT", "/v1/models"), ("OPTIONS", "/v1/models"), ("TRACE", "/healthz")):
                r = await client.request(method, path)
                assert (r.status_code, r.json()["error"]["code"]) == (405, "method_not_allowed"), (method, path)
            assert (await client.head("/v1/models")).status_code == 200
            for body in (b"", b"\xff\xfe", b"{" * 100_000, b'{"model": NaN}', b'{"model": "m", "user": "\\ud800"}', b"[]", b'"m"', b"null"):
                r = await client.post("/v1/chat/completions", content=body, headers={"content-type": "text/plain"})
                assert r.status_code == 400, body[:50]
                assert set(r.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(run())


def test_a_renewed_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    async def serial(port: int) -> int:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust(tmp_path), server_hostname="localhost")
        data = writer.get_extra_info("ssl_object").getpeercert(True)
        writer.close()
        return x509.load_der_x509_certificate(data).serial_number

    async def run() -> None:
        async with gateway(tmp_path, fronts()) as (port, config):
            assert isinstance(config.ssl, ssl.SSLContext)
            renewal = asyncio.create_task(https.renew(config.ssl, tmp_path, 0.02))
            first = await serial(port)
            (tmp_path / "tls.crt").write_bytes(b"half")
            await asyncio.sleep(0.1)
            assert await serial(port) == first
            certify(tmp_path)
            async with asyncio.timeout(5):
                while await serial(port) == first:
                    await asyncio.sleep(0.02)
            assert not renewal.done()
            renewal.cancel()

    asyncio.run(run())


class Ended:
    """Stands for a front's process: notes that it was killed."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()

    async def kill(self) -> int:
        self.killed.set()
        return -9


def test_a_front_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        for name, value in (("PING_S", 0.05), ("PING_TIMEOUT_S", 0.1)):
            monkeypatch.setattr(fronts_module, name, value)
        upstream, child = Upstream(), Ended()
        async with serving(uvicorn.Config(upstream.app(), log_level="warning", lifespan="off")) as up:
            hanging = front(up)
            hanging.ready.clear()
            watch = asyncio.create_task(Fronts(tmp_path, tmp_path, "gw", tmp_path / "s")._watch(hanging, child))  # type: ignore[arg-type]
            async with asyncio.timeout(10):
                await hanging.ready.wait()
            await asyncio.sleep(0.5)
            assert not child.killed.is_set()
            upstream.hung.set()
            async with asyncio.timeout(10):
                await child.killed.wait()
            await watch

    asyncio.run(run())


def test_another_model_under_the_same_name_gets_another_front() -> None:
    route = front(1).route
    other = gateway_pb2.PoolRoute.FromString(route.SerializeToString())
    other.nodes[0].groups[0].epoch = 9
    other.model.revision = "resolved later"
    assert fronts_module._same(route, other)
    other.model.source.path = "/elsewhere"
    assert not fronts_module._same(route, other)


def _arguments(tmp_path: Path, listen: int, control: int, tls: Path) -> Any:
    flags = ["--listen", f"127.0.0.1:{listen}", "--control-listen", f"127.0.0.1:{control}", "--tls-dir", str(tls)]
    return main.arguments([*flags, "--state-dir", str(tmp_path / "state")])


@pytest.mark.parametrize("what", ["listen", "control", "no certificates", "a key that does not fit"])
def test_what_cannot_serve_says_so_and_ends(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tls = tmp_path / "tls"
    certify(tls)
    if what == "no certificates":
        (tls / "tls.crt").unlink()
    if what == "a key that does not fit":
        (tls / "tls.key").write_bytes(issue(CA, Identity("gateway", "u"))["tls.key"])
    with socket.socket() as taken, socket.socket() as other:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC's servers do unless told otherwise
        for s in (taken, other):
            s.bind(("127.0.0.1", 0))
        taken.listen()
        used, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        ports = {"listen": (used, free), "control": (free, used)}.get(what, (0, 0))
        with pytest.raises(SystemExit) as end:
            asyncio.run(main.serve(_arguments(tmp_path, *ports, tls)))
    assert end.value.code not in (0, None)
    assert not [p for p in os.listdir(tmp_path) if p.startswith("nitsum-gw-")]


def test_an_error_of_the_front_keeps_openais_shape() -> None:
    for status, text, code in (
        (400, json.dumps({"message": "x longer than the model's context length"}), "context_length_exceeded"),
        (400, json.dumps({"error": {"message": "9 tokens, at most 8 fit [context length]"}}), "context_length_exceeded"),
        (422, "not json", None),
        (429, json.dumps({"message": "full [retry after 1700 ms]"}), None),
    ):
        r = dispatcher._openai_error(status, text)
        body = json.loads(r.body)["error"]
        assert set(body) == {"message", "type", "param", "code"}
        assert (r.status_code, body["code"]) == (status, code)
        assert "[" not in body["message"]
        assert r.headers.get("retry-after") == ("2" if status == 429 else None)
