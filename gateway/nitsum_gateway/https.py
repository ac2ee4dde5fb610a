"""The clients' listener. Certificates are read again when they change; slow or silent connections are cut off."""

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

HEADERS_S = 20.0
"""From a connection, or the first byte of a later request on it, to the request's last header."""
CONNECTIONS_MAX = 10_000
"""Past it requests get 503 at once."""
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection (OpenAI's, by httpx, 5 s): one that sends just as we close would lose its request."""
RENEW_S = 30.0


class Protocol(H11Protocol):
    """uvicorn bounds only the time between requests: a client that sends half a header would stay for ever."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle:
            self._arm()
        elif self._due is not None:
            self._due.cancel()
            self._due = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        if self._due is None and not self.transport.is_closing():
            self._due = self.loop.call_later(HEADERS_S, self._late)

    def _late(self) -> None:
        self._due = None
        if self._idle:
            self.transport.abort()


def config(app: Any, listen: str, tls_dir: Path, drain_s: int) -> uvicorn.Config:
    """Raises OSError (ssl.SSLError is one) when the folder does not hold a certificate and its key."""
    host, _, port = listen.rpartition(":")
    c = uvicorn.Config(
        app,
        host=host,
        port=int(port),
        http=Protocol,
        ws="none",
        lifespan="off",
        ssl_certfile=str(tls_dir / "tls.crt"),
        ssl_keyfile=str(tls_dir / "tls.key"),
        log_level="warning",
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
    )
    c.load()
    return c


async def renew(context: ssl.SSLContext, tls_dir: Path, every_s: float = RENEW_S) -> None:
    """Never returns. New handshakes get what is in the folder now: certificates live a month, a gateway longer."""
    names = tls_dir / "tls.crt", tls_dir / "tls.key"
    seen = [p.stat().st_mtime_ns for p in names]
    while True:
        await asyncio.sleep(every_s)
        try:
            now = [p.stat().st_mtime_ns for p in names]
            if now != seen:
                context.load_cert_chain(*names)
                seen = now
                log.info("serving the renewed certificate")
        except OSError as error:  # half written: the old one stays until the next look
            log.warning("certificate: %s", error)
