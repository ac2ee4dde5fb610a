"""The first process of an engine: resolves SGLang's arguments, forks one scheduler per rank, turns our requests into theirs.

No HTTP server, no TokenizerManager, no detokenizer: the leader binds what a scheduler dials for input, the host reads what it sends.
Frames from the host (`seam.py` names them) come over a ZMQ PAIR; what it has to say goes back as JSON. The leader's death is the
engine's: each rank dies with it, and it ends as soon as one rank does.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from nitsum_sglang import checkpoint, plugins, remains, seam
from nitsum_sglang.zygote import die_with_parent

RANK_STOP_S = 5.0


def server_arguments(spec: dict[str, Any]) -> list[str]:
    """SGLang's command line for an engine. Raises ValueError or UnsupportedModel where the checkpoint lacks what is needed."""
    config = checkpoint.config(spec["model_path"])
    tp = int(spec["tp_size"])
    args = ["--model-path", spec["model_path"], "--device", spec["device"], "--tp-size", str(tp), "--host", "127.0.0.1"]
    args += ["--disable-overlap-schedule", "--sleep-on-idle", "--skip-server-warmup", "--page-size", "16", "--log-level", "info"]
    args += ["--enable-mixed-chunk"]  # possible; `plugins/governor.py` says when
    args += ["--max-total-tokens", str(spec["max_total_tokens"]), "--mem-fraction-static", "0.2" if spec["device"] == "cpu" else "0.8"]
    if spec["device"] == "cpu":
        args += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    args += ["--dtype", checkpoint.served_dtype(spec["model_path"], spec["dtype"])]
    for flag, value in (
        ("--context-length", spec["context_length"]),
        ("--tool-call-parser", spec["tool_call_parser"]),
        ("--reasoning-parser", spec["reasoning_parser"]),
    ):
        if value:
            args += [flag, str(value)]
    if spec["weight_socket"]:
        args += ["--weight-cache-mode", "client", "--weight-cache-socket", spec["weight_socket"]]
    if spec["kv_dir"]:
        if not spec["revision"]:
            raise ValueError("revision: empty; without it two checkpoints would share KV")
        heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
        if not heads:
            raise ValueError(f"{spec['model_path']}/config.json has neither num_key_value_heads nor num_attention_heads")
        extra = {
            "directory": spec["kv_dir"],
            "namespace": spec["revision"],
            "total_kv_heads": int(heads),
            "max_bytes": spec["kv_max_bytes"],
        }
        linker = {"linker": "SharedKvLinker", "linker_module_path": "nitsum_sglang.kv.linker", "linker_extra_config": extra}
        args += ["--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic"]
        args += ["--unified-cache-external-linker-config", json.dumps(linker)]
    if spec["seed_exact"]:
        args.append("--enable-deterministic-inference")
    return args + list(spec["extra_args"])


def _environment(spec: dict[str, Any], tmp: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    os.environ.update(
        TMPDIR=str(tmp),
        NITSUM_ENGINE_ID=spec["engine_id"],
        NITSUM_GPUS=json.dumps(list(spec["gpu_uuids"])),
        NITSUM_STATE_DIR=spec["state_dir"],
        NITSUM_WEIGHT_STORE="1" if spec["weight_socket"] else "0",
        SGLANG_CPU_OMP_THREADS_BIND="|".join(str(cpus[i % len(cpus)]) for i in range(int(spec["tp_size"]))),
        # A file instead of a TCP port: nothing to collide with another engine that starts, nothing to dial.
        SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE=f"file://{tmp}/rendezvous",
    )
    tempfile.tempdir = None


def _prepare(spec: dict[str, Any]) -> tuple[Any, Any]:
    """ServerArgs and PortArgs as every entry point of SGLang makes them, with the seam's own socket names."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    load_plugins()
    wanted = {"exact_resume", "awake_log", "governor", "step_times"} | ({"weights"} if spec["weight_socket"] else set())
    if missing := wanted - plugins.loaded():
        raise RuntimeError(f"SGLang did not load our plugins {sorted(missing)}: is nitsum installed with its entry points?")
    server_args = prepare_server_args(server_arguments(spec))
    server_args.resolve_once()
    server_args.check_server_args()
    publish(server_args, role="tokenizer")
    sockets = seam.addresses(spec["state_dir"])
    ports = dataclasses.replace(
        PortArgs.init_new(server_args),
        scheduler_input_ipc_name=sockets["input"],
        detokenizer_ipc_name=sockets["tokens"],
        tokenizer_ipc_name=sockets["replies"],
        rpc_ipc_name=sockets["rpc"],
        metrics_ipc_name=sockets["metrics"],
    )
    return server_args, ports


def _rank_main(server_args: Any, ports: Any, rank: int, gpu: int, pipe: Any, leader: int) -> None:
    die_with_parent(leader)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    run_scheduler_process(server_args, ports, gpu, rank, 0, None, pipe)


def _start_ranks(server_args: Any, ports: Any, forked: bool) -> tuple[list[Any], list[Any]]:
    context = multiprocessing.get_context("fork" if forked else "spawn")
    processes, pipes = [], []
    for rank in range(server_args.tp_size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(  # type: ignore[attr-defined]
            target=_rank_main, args=(server_args, ports, rank, rank, writer, os.getpid()), name=f"rank{rank}"
        )
        process.start()
        writer.close()
        processes.append(process)
        pipes.append(reader)
    return processes, pipes


def main(args: dict[str, Any]) -> None:
    """Target of `Zygote.fork`."""
    spec = args["spec"]
    state_dir = Path(spec["state_dir"])
    tmp = state_dir / "tmp"
    signal.signal(signal.SIGQUIT, lambda *_: os._exit(3))  # a rank says so that it hit an exception; its traceback is in the log
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    _environment(spec, tmp)
    if spec["seed_exact"] and spec["device"] == "cpu":
        import torch._dynamo

        torch._dynamo.config.disable = True
    os.chdir(state_dir)
    try:
        _serve(spec, state_dir, forked=bool(args["forked"]))
    except Exception as error:
        traceback.print_exc()
        (state_dir / "error").write_text(f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(1)


def _serve(spec: dict[str, Any], state_dir: Path, forked: bool) -> None:
    server_args, ports = _prepare(spec)
    processes, pipes = _start_ranks(server_args, ports, forked)
    pids = [p.pid for p in processes]
    (state_dir / "remains.json").write_text(json.dumps({"pids": pids, "instance": ports.instance_id}))

    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from nitsum_sglang.requests import Requests

    zmq: Any = importlib.import_module("zmq")  # its stubs miss what it exports
    context = zmq.Context(1)
    sockets = seam.addresses(str(state_dir))
    to_ranks, host = context.socket(zmq.PUSH), context.socket(zmq.PAIR)
    unread = [context.socket(zmq.DEALER), context.socket(zmq.PULL)]  # bound, so that nothing queues up for ever
    for s in (to_ranks, host, *unread):
        s.setsockopt(zmq.LINGER, 0)
        s.setsockopt(zmq.SNDHWM, 0)
        s.setsockopt(zmq.RCVHWM, 0)
    to_ranks.bind(sockets["input"])
    unread[0].bind(sockets["rpc"])
    unread[1].bind(sockets["metrics"])
    host.connect(sockets["leader"])
    tokenizer = get_tokenizer(spec["model_path"], tokenizer_mode=server_args.tokenizer_mode, trust_remote_code=False)
    info = _ready(processes, pipes)
    remains.unlink_shared_memory(state_dir)  # every rank has it mapped: from here on no crash leaves any behind
    requests = Requests(tokenizer, _vocab_size(spec["model_path"]), priorities=bool(server_args.enable_priority_scheduling))
    about = {"max_total_tokens": info["max_total_num_tokens"], "max_req_input_len": info["max_req_input_len"], "pids": [os.getpid(), *pids]}
    host.send(json.dumps({"ready": about | {"fields": requests.fields()}}).encode())
    poller = zmq.Poller()
    poller.register(host, zmq.POLLIN)
    for s in unread:
        poller.register(s, zmq.POLLIN)
    for process in processes:
        poller.register(process.sentinel, zmq.POLLIN)
    while True:
        for source, _ in poller.poll():
            if source is host:
                answer = requests.handle(host.recv_multipart(), to_ranks.send)
                if answer is not None:
                    host.send(json.dumps(answer).encode())
            elif source in unread:
                source.recv()
            else:
                raise RuntimeError(f"a scheduler ended: {[(p.name, p.exitcode) for p in processes if not p.is_alive()]}")


def _ready(processes: list[Any], pipes: list[Any]) -> dict[str, Any]:
    infos = []
    for process, pipe in zip(processes, pipes, strict=True):
        try:
            infos.append(pipe.recv())
        except EOFError:
            process.join(RANK_STOP_S)
            raise RuntimeError(f"{process.name} ended while it loaded (exit code {process.exitcode})") from None
    first: dict[str, Any] = infos[0]
    return first


def _vocab_size(model_path: str) -> int:
    return int(json.loads(Path(model_path, "config.json").read_text())["vocab_size"])
