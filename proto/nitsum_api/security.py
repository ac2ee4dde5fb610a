"""mTLS between nitsum's parts: one certificate folder per process, one role per certificate, both sides check the other.

A folder holds what a Kubernetes TLS Secret holds: `ca.crt`, `tls.crt`, `tls.key`. Certificates name `<role>.nitsum.internal`
(DNS, which clients verify) and `spiffe://nitsum.io/<role>/<name>` (URI, which servers verify).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

ROLES = ("operator", "agent", "host", "gateway")
TRUST_DOMAIN = "nitsum.io"

MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


@dataclass(frozen=True)
class Identity:
    """Who a certificate says that its holder is."""

    role: str
    name: str

    @property
    def uri(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/{self.role}/{self.name}"


def dns_name(role: str) -> str:
    """The name that a client verifies in the server's certificate."""
    assert role in ROLES, role
    return f"{role}.nitsum.internal"


def _read(folder: Path) -> tuple[bytes, bytes, bytes]:
    return (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes(), (folder / "ca.crt").read_bytes()


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Requires client certificates of the same CA. Files are read again when they change, so rotation needs no restart.

    Raises FileNotFoundError when the folder is incomplete.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        key, chain, root = _read(folder)
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=root)

    def stamp() -> int:
        return max((folder / n).stat().st_mtime_ns for n in ("tls.key", "tls.crt", "ca.crt"))

    seen = [stamp()]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            if (now := stamp()) == seen[0]:
                return None
            seen[0] = now
            return configuration()
        except OSError:  # half written: the old one stays until the next handshake asks again
            return None

    # The stubs forget that None means: as before.
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)  # type: ignore[arg-type]


def secure_channel(address: str, server_role: str, folder: Path) -> grpc.aio.Channel:
    """A channel that talks only to a server whose certificate is of `server_role`."""
    key, chain, root = _read(folder)
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    return grpc.aio.secure_channel(address, credentials, [*_OPTIONS, ("grpc.ssl_target_name_override", dns_name(server_role))])


def server_options() -> list[tuple[str, int]]:
    return list(_OPTIONS)


def peer_identity(context: grpc.aio.ServicerContext[Any, Any]) -> Identity | None:
    """Identity in the client's certificate, None without a valid URI."""
    for name in context.auth_context().get("x509_subject_alternative_name", []):
        parts = name.decode(errors="replace").removeprefix(f"spiffe://{TRUST_DOMAIN}/").split("/")
        if name.startswith(f"spiffe://{TRUST_DOMAIN}/".encode()) and len(parts) == 2 and parts[0] in ROLES:
            return Identity(parts[0], parts[1])
    return None


async def require_role(context: grpc.aio.ServicerContext[Any, Any], role: str) -> Identity:
    """The first line of every servicer method: ends the call with PERMISSION_DENIED unless the caller has this role."""
    who = peer_identity(context)
    if who is None or who.role != role:
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"only the {role} may call this; the caller is {who.uri if who else 'unknown'}"
        )
        raise AssertionError("abort raises")
    return who
