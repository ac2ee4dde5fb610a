"""One pool's front: SGLang's own HTTP server, tokenizer and detokenizer, unchanged, with our router in the scheduler's place.

Started by the gateway from a zygote; `python -m nitsum_gateway.front ARGS.json` runs one by hand. Loopback only, behind keys that only the
gateway knows. Must not import gRPC: the router is forked from here and imports its own.
"""

import json
import logging
import multiprocessing
import os
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
KEEP_ALIVE_S = 60
"""How long a front keeps an idle connection; the dispatcher drops its side far sooner (its `REUSE_S`). Whoever sends on a connection
that the other side is just closing loses the request: with both at their libraries' 5 s one in some thousands did."""


def arguments(args: dict[str, Any]) -> list[str]:
    """SGLang's flags. Keys are not among them: they go into ServerArgs directly, so that no argv shows them."""
    flags = ["--model-path", args["model_path"], "--served-model-name", args["model"], "--host", "127.0.0.1", "--port", str(args["port"])]
    flags += ["--skip-server-warmup", "--incremental-streaming-output", "--log-level", "warning", "--tokenizer-worker-num", "1"]
    if args.get("revision"):
        flags += ["--revision", args["revision"]]
    if args.get("context_length"):
        flags += ["--context-length", str(args["context_length"])]
    if args["device"] == "cpu":
        flags += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    return flags


def context_length(args: dict[str, Any]) -> int:
    """As wished, else as the checkpoint's config says."""
    if args.get("context_length"):
        return int(args["context_length"])
    from sglang.srt.utils.hf_transformers_utils import get_config, get_context_length

    config = get_config(args["model_path"], trust_remote_code=False, revision=args.get("revision") or None)
    return int(get_context_length(config))


def _fork_children(*_: Any) -> None:
    """Runs just after SGLang chose 'spawn' and before it starts any process: a fork takes milliseconds, an import half a minute."""
    from multiprocessing import resource_tracker

    from nitsum_sglang.zygote import threads

    resource_tracker.ensure_running()
    if len(threads()) == 1:
        multiprocessing.set_start_method("fork", force=True)
    else:
        log.warning("threads before fork: %s; children are spawned", threads())


def _status_as_enum(original: Any, self: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's streams show an error only if its status is an HTTPStatus; over msgpack it arrives as an int."""
    finish = out["meta_info"]["finish_reason"]
    if finish.get("status_code") is not None:
        finish["status_code"] = HTTPStatus(finish["status_code"])
    return original(self, out, *args, **kwargs)


def run(args: dict[str, Any]) -> None:
    """Target of `Zygote.fork`. Serves until it is killed."""
    if "grpc" in sys.modules:
        raise RuntimeError("gRPC is loaded before the fork")
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import prepare_server_args

    from nitsum_gateway.router import run_router

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork_children, HookType.AFTER)
    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason", _status_as_enum, HookType.AROUND
    )
    load_plugins()
    settings = {k: args[k] for k in ("pool", "uid", "socket", "gateway_id", "tls_dir")}
    os.environ["SGLANG_TIMEOUT_KEEP_ALIVE"] = str(KEEP_ALIVE_S)
    os.environ["NITSUM_FRONT"] = json.dumps({**settings, "context_length": context_length(args)})
    server_args = prepare_server_args(arguments(args))
    server_args.api_key, server_args.admin_api_key = args["api_key"], args["admin_api_key"]
    launch_server(server_args, run_scheduler_process_func=run_router)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
