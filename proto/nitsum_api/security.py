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
URI_PREFIX = f"spiffe://{TRUST_DOMAIN}/"

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
        return f"{URI_PREFIX}{self.role}/{self.name}"


def dns_name(role: str) -> str:
    """The name that a client verifies in the server's certificate."""
    assert role in ROLES, role
    return f"{role}.nitsum.internal"


def _read(folder: Path) -> tuple[bytes, bytes, bytes]:
    return (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes(), (folder / "ca.crt").read_bytes()


def stamp(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Differs after every rotation, also after one to files that are older. Raises FileNotFoundError when the folder is incomplete."""
    found = [(folder / n).stat() for n in ("tls.key", "tls.crt", "ca.crt")]
    return tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in found)


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Requires client certificates of the same CA. Files are read again when they change, so rotation needs no restart.

    Raises FileNotFoundError when the folder is incomplete.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        key, chain, root = _read(folder)
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=root)

    seen = [stamp(folder)]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            if (now := stamp(folder)) == seen[0]:
                return None
            fresh = configuration()
        except OSError:  # half written: the old one stays until the next handshake asks again
            return None
        seen[0] = now
        return fresh

    # The stubs forget that None means: as before.
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)  # type: ignore[arg-type]


def secure_channel(address: str, server_role: str, folder: Path) -> grpc.aio.Channel:
    """A channel that talks only to a server whose certificate is of `server_role`.

    It keeps the certificate that it began with: who holds one for long opens another when `stamp(folder)` has changed.
    """
    key, chain, root = _read(folder)
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    return grpc.aio.secure_channel(address, credentials, [*_OPTIONS, ("grpc.ssl_target_name_override", dns_name(server_role))])


def server_options() -> list[tuple[str, int]]:
    """A port that another process listens on is an error, never shared with it."""
    return [*_OPTIONS, ("grpc.so_reuseport", 0)]


def peer_identity(context: grpc.aio.ServicerContext[Any, Any]) -> Identity | None:
    """Identity in the client's certificate, None without exactly one valid URI: who claims to be two is neither."""
    names = [n.decode(errors="replace") for n in context.auth_context().get("x509_subject_alternative_name", [])]
    claimed = [n.removeprefix(URI_PREFIX).split("/") for n in names if n.startswith(URI_PREFIX)]
    if len(claimed) != 1 or len(claimed[0]) != 2 or claimed[0][0] not in ROLES:
        return None
    return Identity(*claimed[0])


async def require_role(context: grpc.aio.ServicerContext[Any, Any], role: str) -> Identity:
    """The first line of every servicer method: ends the call with PERMISSION_DENIED unless the caller has this role."""
    who = peer_identity(context)
    if who is None or who.role != role:
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"only the {role} may call this; the caller is {who.uri if who else 'unknown'}"
        )
        raise AssertionError("abort raises")
    return who
