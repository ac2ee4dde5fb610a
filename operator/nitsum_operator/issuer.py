"""The CA and one certificate Secret per role; the operator's own credentials as a private folder. Level-triggered: valid ones are kept."""

import base64
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from nitsum_api.issue import issue, new_ca
from nitsum_api.security import Identity

LABELS = {"app.kubernetes.io/name": "nitsum", "app.kubernetes.io/managed-by": "nitsum-operator"}
"""Helm knows nothing of these Secrets: an uninstall leaves them, and people find them by this."""


def due(certificate_pem: bytes, now: datetime) -> bool:
    """Renewed at two thirds of its life; what cannot be read is renewed at once."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except ValueError:
        return True
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= start + (end - start) * 2 / 3


def gateway_names(namespace: str) -> tuple[str, ...]:
    """Names under which OpenAI clients reach the gateway."""
    service = f"nitsum-gateway.{namespace}"
    return ("localhost", "nitsum-gateway", service, f"{service}.svc", f"{service}.svc.cluster.local")


class Issuer:
    """Blocking; call it in a thread."""

    def __init__(self, core: Any, namespace: str, secrets: Mapping[str, str]) -> None:
        self._core, self._namespace, self._secrets = core, namespace, secrets
        self._folder: Path | None = None

    def _read(self, name: str) -> tuple[dict[str, bytes], str] | None:
        try:
            secret = self._core.read_namespaced_secret(name, self._namespace)
        except ApiException as e:
            if e.status == 404:
                return None
            raise
        return {k: base64.b64decode(v) for k, v in (secret.data or {}).items()}, secret.metadata.resource_version

    def _write(self, name: str, data: Mapping[str, bytes], version: str | None) -> None:
        """Creates it, or replaces the version that was read. A conflict raises ApiException: the next cycle looks again."""
        body = client.V1Secret(
            metadata=client.V1ObjectMeta(name=name, namespace=self._namespace, resource_version=version, labels=LABELS),
            type="kubernetes.io/tls",
            data={k: base64.b64encode(v).decode() for k, v in data.items()},
        )
        if version is None:
            self._core.create_namespaced_secret(self._namespace, body)
        else:
            self._core.replace_namespaced_secret(name, self._namespace, body)

    def ensure(self) -> Path:
        """All Secrets exist and are valid; returns the folder with the operator's own credentials."""
        now = datetime.now(UTC)
        found = self._read(self._secrets["ca"])
        if found is None or not {"tls.crt", "tls.key"} <= set(found[0]):
            ca = new_ca(now)
            self._write(self._secrets["ca"], {**ca, "ca.crt": ca["tls.crt"]}, found[1] if found else None)
        else:
            ca = found[0]
        own: dict[str, bytes] = {}
        for role in ("operator", "agent", "host", "gateway"):
            found = self._read(self._secrets[role])
            leaf = found[0] if found else {}
            if due(leaf.get("tls.crt", b""), now) or leaf.get("ca.crt") != ca["tls.crt"] or not leaf.get("tls.key"):
                extra = gateway_names(self._namespace) if role == "gateway" else ()
                leaf = issue(ca, Identity(role, role), extra, now)
                self._write(self._secrets[role], leaf, found[1] if found else None)
            if role == "operator":
                own = leaf
        return self._keep(own)

    def _keep(self, own: Mapping[str, bytes]) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nitsum-operator-"))  # mode 0700
        for name in ("ca.crt", "tls.crt", "tls.key"):
            target = self._folder / name
            if not target.exists() or target.read_bytes() != own[name]:
                part = target.with_suffix(".part")
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
                    f.write(own[name])
                part.replace(target)
        return self._folder

    def close(self) -> None:
        """The operator's own key does not outlive it on disk."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


RECHECK = timedelta(minutes=1)
"""How often Secrets are looked at."""
