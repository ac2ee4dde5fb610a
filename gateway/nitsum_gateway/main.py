"""`nitsum-gateway`: one OpenAI endpoint (HTTPS) for all pools, and the operator's door to it (gRPC, mTLS)."""

import argparse
import asyncio
import logging
import os
import shutil
import signal
import ssl
import sys
import tempfile
from pathlib import Path

import grpc.aio
import uvicorn

from nitsum_api.gateway.v1 import gateway_pb2_grpc
from nitsum_api.security import server_credentials, server_options
from nitsum_gateway import https, metrics
from nitsum_gateway.dispatcher import Dispatcher
from nitsum_gateway.fronts import Fronts
from nitsum_gateway.service import Gateway


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="nitsum-gateway", description=__doc__)
    p.add_argument("--listen", required=True, metavar="HOST:PORT", help="OpenAI endpoint (HTTPS)")
    p.add_argument("--control-listen", required=True, metavar="HOST:PORT", help="where the operator reaches this gateway (mTLS)")
    p.add_argument("--tls-dir", required=True, type=Path, help="folder with ca.crt, tls.crt, tls.key of role gateway")
    p.add_argument("--state-dir", required=True, type=Path, help="routes and highest term; survive restarts")
    p.add_argument("--gateway-id", default=os.uname().nodename)
    p.add_argument("--drain-s", type=int, default=5, help="how long streams may go on after SIGTERM")
    return p.parse_args(argv)


async def serve(args: argparse.Namespace) -> None:
    args.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    run_dir = Path(tempfile.mkdtemp(prefix="nitsum-gw-"))  # a Unix socket's name is short, the state folder's may not be
    try:
        await _serve(args, run_dir)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


async def _serve(args: argparse.Namespace, run_dir: Path) -> None:
    socket = run_dir / "fronts.sock"
    fronts = Fronts(args.state_dir, args.tls_dir, args.gateway_id, socket)
    gateway = Gateway(args.gateway_id, args.state_dir, fronts, metrics.observe)
    control = grpc.aio.server(options=[*server_options(), ("grpc.so_reuseport", 0)])  # a port in use is an error
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(gateway, control)
    try:
        config = https.config(Dispatcher(fronts).app(), args.listen, args.tls_dir, args.drain_s)
        control.add_secure_port(args.control_listen, server_credentials(args.tls_dir))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"nitsum-gateway: cannot serve on {args.listen} and {args.control_listen} with {args.tls_dir}: {error}")
    listener = config.bind_socket()  # says why and exits
    inside = grpc.aio.server()
    gateway_pb2_grpc.add_FrontServiceServicer_to_server(gateway, inside)
    inside.add_insecure_port(f"unix:{socket}")
    await inside.start()
    os.chmod(socket, 0o600)
    await control.start()
    await gateway.serve()  # what was in force before a restart

    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined, method-assign, unused-ignore]
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, lambda: setattr(server, "should_exit", True))
    assert isinstance(config.ssl, ssl.SSLContext)
    tasks = [asyncio.create_task(https.renew(config.ssl, args.tls_dir)), asyncio.create_task(fronts.prepare())]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()
        await fronts.stop()
        await asyncio.gather(control.stop(1), inside.stop(1))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(arguments()))


if __name__ == "__main__":
    main()
