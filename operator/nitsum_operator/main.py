"""nitsum-operator: watches ServingPools by kopf and reconciles them once a second."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import kopf
from kubernetes import client
from kubernetes import config as kube_config

from nitsum.errors import InvalidSpec
from nitsum.perf.profile import Profile
from nitsum.perf.profile import parse as parse_profile
from nitsum_operator import settings as operator_settings
from nitsum_operator.handlers import Store, register
from nitsum_operator.reconcile import Reconciler

HEALTHY_FOR_S = 60.0
REQUEST_S = (5.0, 10.0)
"""To connect to the API server, and to read an answer."""


class PatientClient(client.ApiClient):  # type: ignore[misc]
    """No call waits for ever: by default the library would, on a connection that nobody ends."""

    def call_api(self, *args: Any, **named: Any) -> Any:
        named["_request_timeout"] = named.get("_request_timeout") or REQUEST_S
        return super().call_api(*args, **named)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="nitsum-operator", description=__doc__)
    p.add_argument("--namespace", default=os.environ.get("POD_NAMESPACE", "nitsum-system"), help="namespace of the release")
    p.add_argument("--tls-dir", type=Path, help="mounted certificate folder; not needed: the operator issues its own")
    p.add_argument("--config", type=Path, help="config.yaml as the chart writes it; default: the chart's defaults")
    p.add_argument("--kubeconfig", type=Path, help="default: the service account of the pod")
    p.add_argument("--health-port", type=int, help="overrides healthPort; 0: none")
    p.add_argument("--profile-dir", type=Path, help="folder of <name>.json step-time profiles, beside the shipped ones")
    return p.parse_args()


def read_profiles(folder: Path | None) -> dict[str, Profile]:
    """By file name without .json. Raises InvalidSpec."""
    return {f.stem: parse_profile(f.read_text(), f.stem) for f in sorted(folder.glob("*.json"))} if folder else {}


async def serve_health(port: int, reconciler: Reconciler) -> asyncio.Server:
    """GET /healthz: 200 while cycles succeed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
            healthy = time.monotonic() - reconciler.beat < HEALTHY_FOR_S
            line, body = ("200 OK", b"ok") if healthy else ("503 Service Unavailable", b"no cycle succeeded for a minute")
            writer.write(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "0.0.0.0", port)


async def run(args: argparse.Namespace, settings: operator_settings.Settings, profiles: dict[str, Profile]) -> None:
    if args.kubeconfig:
        os.environ["KUBECONFIG"] = str(args.kubeconfig)  # kopf reads it there
        kube_config.load_kube_config(str(args.kubeconfig))
    else:
        kube_config.load_incluster_config()
    store, stop, ready = Store(), asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    holder = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    reconciler = Reconciler(PatientClient(), args.namespace, holder, settings, profiles, store)
    kopf_settings = kopf.OperatorSettings()
    kopf_settings.posting.enabled = False
    kopf_settings.peering.standalone = True
    watch = asyncio.create_task(
        kopf.operator(registry=register(store), settings=kopf_settings, clusterwide=True, standalone=True, stop_flag=stop, ready_flag=ready)
    )
    port = settings.health_port if args.health_port is None else args.health_port
    health = await serve_health(port, reconciler) if port else None
    await asyncio.wait([watch, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    loop = asyncio.create_task(reconciler.run())
    await asyncio.wait([watch, loop, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    if health is not None:
        health.close()
    await watch


def main() -> None:
    args = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        settings = operator_settings.load(args.config) if args.config else operator_settings.Settings()
        profiles = read_profiles(args.profile_dir)
    except (InvalidSpec, OSError) as e:
        sys.exit(f"nitsum-operator: {e}")
    asyncio.run(run(args, settings, profiles))


if __name__ == "__main__":
    main()
