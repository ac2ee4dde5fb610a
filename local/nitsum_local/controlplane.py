"""A real Kubernetes control plane on loopback: etcd, kube-apiserver, kube-controller-manager; no root, no container.

A cluster that exists (`KUBECONFIG`) is used only with USE_EXISTING_CLUSTER=true; then nothing is started or stopped.
"""

import asyncio
import base64
import os
import signal
import ssl
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from nitsum_local.binaries import use_existing as use_existing
from nitsum_local.certificates import Authority, write_private, write_service_account_key
from nitsum_local.processes import Spec, Supervisor
from nitsum_sglang.testing.ports import free_ports

TOKEN_S = 24 * 3600
_SERVICE_IPS, _SERVICE_IP = "10.96.0.0/16", "10.96.0.1"


def api_client(kubeconfig: Path) -> Any:
    """A `kubernetes.client.ApiClient` (typed Any: the package has no types)."""
    return config.new_client_from_config(config_file=str(kubeconfig))


class ControlPlane:
    """`await start()`, then `admin_kubeconfig` is the way in; everything it writes lies in `state_dir`."""

    def __init__(self, state_dir: Path, binaries: Mapping[str, Path]) -> None:
        self.state_dir, self.binaries = state_dir.resolve(), binaries
        self.existing = use_existing()
        self.admin_kubeconfig = self.state_dir / "admin.kubeconfig"
        if self.existing:
            self.admin_kubeconfig = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube/config")
        self.server = ""
        self.supervisor: Supervisor | None = None

    async def __aenter__(self) -> "ControlPlane":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Ready when the API server answers and the controllers work. Raises ProcessFailed, with nothing left running."""
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.existing:
            if not self.admin_kubeconfig.is_file():
                raise FileNotFoundError(f"USE_EXISTING_CLUSTER=true, but {self.admin_kubeconfig} is missing: set KUBECONFIG")
            return
        etcd_port, peer_port, api_port = free_ports(3)
        self.server = f"https://127.0.0.1:{api_port}"
        pki = self.state_dir / "pki"
        await asyncio.to_thread(self._issue, pki)
        self.supervisor = Supervisor(self.state_dir / "log")
        try:
            await self.supervisor.start(self._etcd(pki, etcd_port, peer_port))
            await self.supervisor.start(self._apiserver(pki, etcd_port, api_port))
            await self.supervisor.start(self._controllers(pki))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Controllers, API server, then etcd: an API server without etcd takes a minute to leave."""
        if self.supervisor is not None:
            await self.supervisor.stop_all()
            self.supervisor = None

    def client_kubeconfig(self, service_account: str, namespace: str) -> Path:
        """A kubeconfig with exactly the rights of the ServiceAccount; its token lasts a day. Blocks for some ms."""
        with api_client(self.admin_kubeconfig) as api:
            body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": TOKEN_S}}
            token = client.CoreV1Api(api).create_namespaced_service_account_token(service_account, namespace, body).status.token
            ca = base64.b64encode(Path(api.configuration.ssl_ca_cert).read_bytes()).decode()
            server = api.configuration.host
        path = self.state_dir / f"{namespace}.{service_account}.kubeconfig"
        _write_kubeconfig(path, server, {"certificate-authority-data": ca}, {"token": token}, namespace)
        return path

    def _issue(self, pki: Path) -> None:
        ca, etcd = Authority.create(pki, "ca"), Authority.create(pki, "etcd-ca")
        # Its own authority: no certificate of the cluster opens its store.
        etcd.sign("etcd", "etcd", names=("localhost",), ips=("127.0.0.1",))
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        ca.sign("apiserver", "kube-apiserver", names=names, ips=("127.0.0.1", _SERVICE_IP))
        ca.sign("admin", "admin", organization="system:masters")
        ca.sign("controllers", "system:kube-controller-manager")
        write_service_account_key(pki / "sa.key")
        for name, path in (("admin", self.admin_kubeconfig), ("controllers", self.state_dir / "controllers.kubeconfig")):
            user = {"client-certificate": str(pki / f"{name}.crt"), "client-key": str(pki / f"{name}.key")}
            _write_kubeconfig(path, self.server, {"certificate-authority": str(pki / "ca.crt")}, user, "default")

    def _etcd(self, pki: Path, port: int, peer_port: int) -> Spec:
        url, peer = f"https://127.0.0.1:{port}", f"https://127.0.0.1:{peer_port}"
        command = [str(self.binaries["etcd"]), f"--data-dir={self.state_dir / 'etcd'}", f"--listen-client-urls={url}"]
        command += [f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        command += [f"--initial-cluster=default={peer}", "--unsafe-no-fsync", "--log-level=error"]
        for prefix in ("", "peer-"):
            command += [f"--{prefix}cert-file={pki / 'etcd.crt'}", f"--{prefix}key-file={pki / 'etcd.key'}"]
            command += [f"--{prefix}trusted-ca-file={pki / 'etcd-ca.crt'}", f"--{prefix}client-cert-auth"]

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.transport.abort()
            return True

        return Spec("etcd", command, ready=listens, ready_timeout_s=30, death_signal=signal.SIGKILL)

    def _apiserver(self, pki: Path, etcd_port: int, port: int) -> Spec:
        command = [str(self.binaries["kube-apiserver"]), f"--etcd-servers=https://127.0.0.1:{etcd_port}"]
        command += [f"--etcd-cafile={pki / 'etcd-ca.crt'}", f"--etcd-certfile={pki / 'etcd.crt'}", f"--etcd-keyfile={pki / 'etcd.key'}"]
        command += ["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={port}"]
        command += ["--endpoint-reconciler-type=none"]  # no endpoint may be a loopback address
        command += [f"--tls-cert-file={pki / 'apiserver.crt'}", f"--tls-private-key-file={pki / 'apiserver.key'}"]
        command += [f"--client-ca-file={pki / 'ca.crt'}", "--service-account-issuer=https://kubernetes.default.svc"]
        command += [f"--service-account-key-file={pki / 'sa.key'}", f"--service-account-signing-key-file={pki / 'sa.key'}"]
        command += [f"--service-cluster-ip-range={_SERVICE_IPS}", "--authorization-mode=Node,RBAC", "--anonymous-auth=false"]
        command += ["--enable-admission-plugins=NodeRestriction", "--shutdown-delay-duration=0s", f"--cert-dir={pki}"]

        def asks() -> bool:
            context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            context.load_cert_chain(str(pki / "admin.crt"), str(pki / "admin.key"))
            try:
                with urllib.request.urlopen(f"{self.server}/readyz", context=context, timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError:  # not listening yet, or not ready: 500
                return False

        async def ready() -> bool:
            return await asyncio.to_thread(asks)

        return Spec("kube-apiserver", command, ready=ready, ready_timeout_s=90, stop_deadline_s=3, death_signal=signal.SIGKILL)

    def _controllers(self, pki: Path) -> Spec:
        kubeconfig = self.state_dir / "controllers.kubeconfig"
        command = [str(self.binaries["kube-controller-manager"]), "--leader-elect=false", "--use-service-account-credentials"]
        command += [f"--{flag}={kubeconfig}" for flag in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")]
        command += [f"--service-account-private-key-file={pki / 'sa.key'}", f"--root-ca-file={pki / 'ca.crt'}", "--secure-port=0"]
        # No kubelet reports for local nodes, and none should be found lost for that.
        command += [f"--cert-dir={pki}", "--controllers=*,-node-lifecycle-controller"]

        def asks() -> bool:
            try:
                with api_client(self.admin_kubeconfig) as api:
                    client.CoreV1Api(api).read_namespaced_service_account("default", "default", _request_timeout=2)
                return True
            except Exception:
                return False

        async def ready() -> bool:
            return await asyncio.to_thread(asks)

        return Spec("kube-controller-manager", command, ready=ready, ready_timeout_s=60, death_signal=signal.SIGKILL)


def _write_kubeconfig(path: Path, server: str, ca: Mapping[str, str], user: Mapping[str, str], namespace: str) -> None:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "nitsum", "cluster": {"server": server, **ca}}],
        "users": [{"name": "user", "user": dict(user)}],
        "contexts": [{"name": "nitsum", "context": {"cluster": "nitsum", "user": "user", "namespace": namespace}}],
        "current-context": "nitsum",
    }
    write_private(path, yaml.safe_dump(content).encode())
