"""`nitsum-agent`: one per node. It holds no Kubernetes credential; when it stops, the engine host goes on without it."""

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path

import grpc.aio

from nitsum_agent.service import Agent
from nitsum_api.agent.v1 import agent_pb2_grpc
from nitsum_api.security import server_credentials, server_options

STOP_GRACE_S = 3.0
CALLS_MAX = 64
"""At once; a leader holds three. More are refused, so that streams that nobody closes cannot pile up."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="nitsum-agent", description=__doc__)
    p.add_argument("--listen", required=True, metavar="HOST:PORT", help="where the operator reaches this agent (mTLS)")
    p.add_argument("--tls-dir", required=True, type=Path, help="folder with ca.crt, tls.crt, tls.key of role agent")
    p.add_argument("--host-socket", required=True, help="Unix socket of the node's engine host")
    p.add_argument("--state-dir", required=True, type=Path, help="journal of directives; must survive restarts")
    p.add_argument("--agent-id", required=True)
    p.add_argument("--node-name", required=True)
    p.add_argument("--node-group", default="default")
    p.add_argument("--node-address", required=True, metavar="HOST:PORT", help="the node data port, as gateways reach it")
    return p.parse_args(argv)


def alone(state_dir: Path) -> int:
    """Two agents on one journal would each obey a term that the other refused. Held until the process ends, however it ends."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(state_dir / "agent.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"nitsum-agent: another agent uses --state-dir {state_dir}: end it, or give this one a folder of its own")
    return fd


async def serve(args: argparse.Namespace) -> None:
    alone(args.state_dir)
    agent = Agent(args.agent_id, args.node_name, args.node_group, args.node_address, args.host_socket, args.state_dir)
    server = grpc.aio.server(options=server_options(), maximum_concurrent_rpcs=CALLS_MAX)
    agent_pb2_grpc.add_AgentServiceServicer_to_server(agent, server)
    server.add_secure_port(args.listen, server_credentials(args.tls_dir))
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    link = asyncio.create_task(agent.host.run())
    await server.start()
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({link, waiting}, return_when=asyncio.FIRST_COMPLETED)
    await server.stop(STOP_GRACE_S)
    link.cancel()
    await asyncio.gather(link, return_exceptions=True)
    await agent.host.close()
    if not stop.is_set():
        link.result()  # the link never ends by itself: what ended it is a bug and shows here


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(arguments()))


if __name__ == "__main__":
    main()
