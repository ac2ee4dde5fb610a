"""One OpenAI endpoint for all pools: picks the front by `model`, settles the tier, lets only allowed fields pass, streams the answer."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nitsum_gateway import allowed, metrics
from nitsum_gateway.allowed import NAME_CHARS_MAX, TIER_KEY
from nitsum_gateway.bounds import too_long
from nitsum_gateway.fronts import Front, Fronts
from nitsum_gateway.wording import public

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 16 << 20
BODY_S_MAX = 60.0
"""A client that sends its body slower than this is cut off."""
TIER_HEADER = "x-nitsum-tier"
RETRY_AFTER_S = "1"
REUSE_S = 5.0
"""An idle connection to a front is reused this long: `front.KEEP_ALIVE_S` is far longer, and says why."""
MODELS_LISTED_MAX = 20
PASSED = ("content-type", "retry-after")


def error(
    status: int, message: str, code: str | None = None, param: str | None = None, kind: str = "invalid_request_error"
) -> JSONResponse:
    """OpenAI's error shape."""
    headers = None
    if status in (429, 503):
        told = re.search(r"\[retry after (\d+) ms\]", message)
        message = re.sub(r" ?\[retry after \d+ ms\]", "", message)
        headers = {"retry-after": str(max(-(-int(told[1]) // 1000), 1)) if told else RETRY_AFTER_S}
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)


class Dispatcher:
    def __init__(self, fronts: Fronts) -> None:
        self.fronts, self.was_ready = fronts, False
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5), limits=httpx.Limits(max_connections=None, keepalive_expiry=REUSE_S)
        )

    def app(self) -> Starlette:
        posts = [Route(path, self.forward, methods=["POST"]) for path in allowed.FIELDS]
        gets = [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/healthz", self.health),
            Route("/readyz", self.ready),
            Route("/metrics", metrics.expose),
        ]
        return Starlette(routes=[*posts, *gets], exception_handlers={404: _not_found, 405: _not_allowed, 500: _broken})

    async def health(self, request: Request) -> Response:
        return Response("ok")

    async def ready(self, request: Request) -> Response:
        """200 once routes are known and the front of each pool has answered, or failed: one that cannot start must not keep clients from
        the others. Then for good: no pool that comes or breaks later takes this gateway away from them."""
        missing = [m for m, f in sorted(self.fronts.by_model.items()) if not f.served and not f.problem]
        if not self.was_ready and (not self.fronts.routed or missing):
            return Response(f"starting: {', '.join(missing)}" if self.fronts.routed else "no routes yet", 503)
        self.was_ready = True
        return Response("ok")

    async def models(self, request: Request) -> Response:
        data = [{"id": m, "object": "model", "created": 0, "owned_by": "nitsum"} for m in sorted(self.fronts.by_model)]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.fronts.by_model:
            return self._no_model(name)
        return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "nitsum"})

    async def forward(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(BODY_S_MAX):
                body = await _body(request)
        except TimeoutError:
            return error(408, f"the body took longer than {BODY_S_MAX:.0f} s")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        if isinstance(body, Response):
            return body
        path = request.url.path
        if (wrong := allowed.problem(path, body)) is not None:
            return error(400, wrong.message, wrong.code, wrong.param or None)
        front = self.fronts.by_model.get(body["model"])
        if front is None and not self.fronts.routed:
            return error(503, "this gateway has no routes yet", "not_ready", kind="service_unavailable")
        if front is None:
            return self._no_model(body["model"])
        if (wrong := too_long(body, front.context_length)) is not None:
            return error(400, wrong.message, wrong.code, wrong.param)
        if isinstance(tier := self._tier(front, request, body), Response):
            return tier
        if path.startswith("/v1/"):
            body.pop("service_tier", None)
            body["custom_params"] = {TIER_KEY: tier}
        if path.startswith("/v1/") and not any(n.groups for n in front.route.nodes):
            reason = front.route.unready_reason or "no group serves this model yet"
            return error(503, public(503, reason)[0], "no_capacity", kind="service_unavailable")
        if not front.ready.is_set():
            return error(503, "the pool is starting; send the request again", "not_ready", kind="service_unavailable")
        return await _while_there(request, self._pass(front, path, body))

    def _no_model(self, name: str) -> Response:
        known = sorted(self.fronts.by_model)
        more = f" and {len(known) - MODELS_LISTED_MAX} more" if len(known) > MODELS_LISTED_MAX else ""
        there = f"there are: {', '.join(known[:MODELS_LISTED_MAX])}{more}" if known else "no pool serves any"
        return error(404, f"no pool serves model {name[:NAME_CHARS_MAX]!r}; {there}", "model_not_found", "model")

    def _tier(self, front: Front, request: Request, body: dict[str, Any]) -> str | Response:
        """The header outranks the body; `auto` and `default` mean the pool's default tier."""
        tiers = [t.name for t in front.route.tiers]
        default = next((t.name for t in front.route.tiers if t.is_default), tiers[0] if tiers else "")
        header, asked = request.headers.get(TIER_HEADER), body.get("service_tier")
        asked = header if header is not None else "default" if asked is None else asked
        if asked in ("auto", "default"):
            return default
        if asked not in tiers:
            return error(
                400,
                f"unknown tier {str(asked)[:NAME_CHARS_MAX]!r}; this pool's tiers are {', '.join(tiers)}",
                "unknown_tier",
                "service_tier" if header is None else TIER_HEADER,
            )
        return str(asked)

    async def _pass(self, front: Front, path: str, body: dict[str, Any]) -> Response:
        request = self.client.build_request("POST", front.url + path, json=body, headers={"authorization": f"Bearer {front.api_key}"})
        try:
            answer = await self.client.send(request, stream=True)
        except httpx.HTTPError:
            return error(503, "the pool's front does not answer", "not_ready", kind="service_unavailable")
        try:
            return await self._relay(answer)
        except BaseException:  # also when the client has gone: the front hears it and aborts
            await answer.aclose()
            raise

    async def _relay(self, answer: httpx.Response) -> Response:
        headers = {k: v for k, v in answer.headers.items() if k in PASSED}
        chunks = answer.aiter_raw()
        try:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                await answer.aclose()
                return _openai_error(answer.status_code, text)
            first = await anext(chunks, b"")
        except httpx.HTTPError:
            await answer.aclose()
            return error(503, "the pool's front ended", "not_ready", kind="service_unavailable")
        if first.startswith(STREAMED_ERROR):  # nothing was generated: the status is still ours to choose
            await answer.aclose()
            return _streamed_error(first)
        return StreamingResponse(_chunks(answer, first, chunks), answer.status_code, headers)


async def _body(request: Request) -> Any:
    """The parsed body, or what its client gets instead."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY_BYTES_MAX:
            return error(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
    try:
        return json.loads(data, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return error(400, "the body is not JSON")


async def _while_there(request: Request, work: Awaitable[Response]) -> Response:
    """Ends `work` when its client leaves: a request that waits in a queue has no stream that would break."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=400)  # nobody reads it
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STREAMED_ERROR = b'data: {"error"'


def _streamed_error(line: bytes) -> JSONResponse:
    """From the line by which a front ends a stream; no text of a model looks like it, for JSON escapes its quotes."""
    text = line.split(b"\n", 1)[0].removeprefix(b"data: ").decode(errors="replace")
    try:
        status = int(json.loads(text)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        status = 500
    return _openai_error(status if 400 <= status < 600 else 500, text)


def _scrubbed(data: bytes) -> tuple[bytes, bytes]:
    """What may go to the client, and the start of a line that may yet turn out to be an error."""
    whole, end, rest = data.rpartition(b"\n")
    if not (rest.startswith(STREAMED_ERROR) or STREAMED_ERROR.startswith(rest)):
        whole, end, rest = data, b"", b""
    if STREAMED_ERROR in whole:
        lines = whole.split(b"\n")
        whole = b"\n".join(b"data: " + bytes(_streamed_error(x).body) if x.startswith(STREAMED_ERROR) else x for x in lines)
    return whole + end, rest


async def _chunks(answer: httpx.Response, first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """As they come; an error after the first token loses its internals like any other, but the status is spent."""
    stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    try:
        ready, held = _scrubbed(first) if stream else (first, b"")
        yield ready
        async for chunk in chunks:
            ready, held = _scrubbed(held + chunk) if stream else (chunk, b"")
            if ready:
                yield ready
        if held:
            yield _scrubbed(held + b"\n")[0]
    except httpx.HTTPError:  # the front died: no [DONE], so the client knows that this is not the end
        broken = {"message": "the stream broke; send the request again", "type": "server_error", "param": None, "code": "stream_broken"}
        yield b"data: " + json.dumps({"error": broken}).encode() + b"\n\n"
    finally:  # also when the client has gone: the front hears it and aborts
        await answer.aclose()


def _openai_error(status: int, text: str) -> JSONResponse:
    """SGLang's error body in OpenAI's shape, with the codes that clients look for."""
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    inner = body.get("error", body) if isinstance(body, dict) else {}
    said = str(inner.get("message") or text) if isinstance(inner, dict) else text
    message, param = public(status, said)
    if status >= 500 and status != 503 and message not in said:  # others are many, and hold what the client sent
        log.warning("a front's error %d, not for clients: %s", status, said[:2000])
    too_long = status == 400 and ("context length" in message or "longer than the model" in message or "too long" in message)
    message = message.removesuffix(" [context length]")
    kind = {429: "rate_limit_error", 503: "service_unavailable"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return error(status, message, "context_length_exceeded" if too_long else None, param, kind)


async def _not_found(request: Request, exc: Exception) -> Response:
    return error(404, f"{request.method} {request.url.path} is not served", "not_found")


async def _not_allowed(request: Request, exc: Exception) -> Response:
    return error(405, f"{request.method} is not allowed for {request.url.path}", "method_not_allowed")


async def _broken(request: Request, exc: Exception) -> Response:
    """Starlette logs the exception itself."""
    return error(500, "the gateway failed on this request", "internal_error", kind="server_error")
