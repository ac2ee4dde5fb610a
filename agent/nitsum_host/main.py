"""`nitsum-host`: the engine host of a node. Owns its GPUs, its engines and every stream on them."""

import argparse
import asyncio
import logging
import os
import shutil
import signal
from pathlib import Path

import grpc.aio

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.host.v1 import host_pb2_grpc
from nitsum_api.node.v1 import node_pb2_grpc
from nitsum_api.security import server_credentials, server_options
from nitsum_host import streams
from nitsum_host.engines import Engines, Settings
from nitsum_host.journal import Journal
from nitsum_host.leftovers import end_all
from nitsum_host.node import Node
from nitsum_host.port import NodePort
from nitsum_host.service import Host
from nitsum_sglang.engine import SchedulerEngine
from nitsum_sglang.port import Engine, EngineEnded, EngineSpec
from nitsum_sglang.zygote_client import Zygote, ZygoteEnded

log = logging.getLogger(__name__)
EXPIRE_S = 0.25
VIEW_S = 1.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="nitsum-host", description=__doc__)
    p.add_argument("--listen", required=True, metavar="HOST:PORT", help="the node data port (mTLS)")
    p.add_argument("--tls-dir", required=True, type=Path, help="folder with ca.crt, tls.crt, tls.key of role host")
    p.add_argument("--socket", required=True, type=Path, help="Unix socket for the node's agent")
    p.add_argument("--state-dir", required=True, type=Path, help="journal, logs and engine sockets; a short path")
    p.add_argument("--memory-dir", required=True, type=Path, help="folder in memory (tmpfs) for weights and KV; removed at the end")
    p.add_argument("--slots", type=int, default=1, help="declared GPU slots on a machine without GPUs")
    p.add_argument("--node-name", default=os.uname().nodename)
    p.add_argument("--node-address", default="", metavar="HOST:PORT", help="the node data port as gateways reach it; default: --listen")
    p.add_argument("--max-total-tokens", type=int, default=8192, help="KV tokens of each engine")
    p.add_argument(
        "--dtype",
        default="",
        choices=["", "float32", "bfloat16", "float16"],
        help="of weights and KV; default: as each checkpoint says. In float32 a moved stream is, token for token, one that stayed",
    )
    p.add_argument("--seed-exact", action="store_true", help="seeded sampling that does not depend on the batch (slower)")
    p.add_argument("--no-weight-store", action="store_true", help="every engine loads the checkpoint itself")
    return p.parse_args(argv)


async def serve(args: argparse.Namespace) -> None:
    for folder in (args.state_dir, args.memory_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(args.memory_dir / "weights", ignore_errors=True)  # of a host that was killed; sockets that served it are gone too
    await end_all(args.state_dir / "e")
    zygote = Zygote(args.state_dir / "z.sock", args.state_dir / "zygote.log")
    await zygote.start()
    journal = Journal(args.state_dir)
    node = Node(journal.epoch + 1)

    def make(spec: EngineSpec) -> Engine:
        return SchedulerEngine(spec, zygote)

    starting = asyncio.Lock()

    async def prepare() -> None:
        async with starting:
            if not zygote.alive:
                log.warning("the zygote ended, its engines with it; it is started again")
                try:
                    await zygote.start()
                except (ZygoteEnded, OSError) as e:
                    raise EngineEnded(f"the zygote does not start: {e}") from e

    settings = Settings(
        args.state_dir,
        args.memory_dir,
        args.max_total_tokens,
        args.seed_exact,
        not args.no_weight_store,
        dtype=args.dtype,
        zygote=zygote.socket_path if zygote.forks else "",
        make=make,
        prepare=prepare,
    )
    engines = Engines(node, settings, lambda engine_id: host.engine_ended(engine_id))
    gpus = [agent_pb2.Gpu(uuid=f"{args.node_name}-slot-{i}", index=i, type="slot") for i in range(args.slots)]
    host = Host(node, engines, journal, args.state_dir, gpus, args.node_address or args.listen)

    data = grpc.aio.server(options=server_options())
    node_pb2_grpc.add_NodeServiceServicer_to_server(NodePort(node), data)
    data.add_secure_port(args.listen, server_credentials(args.tls_dir))
    await data.start()
    control = grpc.aio.server(options=server_options())
    host_pb2_grpc.add_HostServiceServicer_to_server(host, control)
    args.socket.unlink(missing_ok=True)
    control.add_insecure_port(f"unix:{args.socket}")
    await control.start()
    os.chmod(args.socket, 0o600)

    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    beat = asyncio.create_task(_beat(node))
    await stop.wait()
    beat.cancel()
    await asyncio.gather(data.stop(1), control.stop(1), host.stop())
    await engines.stop()
    await zygote.stop()
    args.socket.unlink(missing_ok=True)


async def _beat(node: Node) -> None:
    """Queues expire, and gateways hear of the node at least each second."""
    since = 0.0
    while True:
        await asyncio.sleep(EXPIRE_S)
        try:
            streams.expire(node)
            since += EXPIRE_S
            if since >= VIEW_S:
                since = 0.0
                node.show()
        except Exception:  # a bug: without this beat every gateway would take the node for lost
            log.exception("beat")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(arguments()))


if __name__ == "__main__":
    main()
