"""What schedulers send, decoded without SGLang; and what a zygote refuses."""

import asyncio
import functools
import json
import math
import os
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import msgspec
import pytest

from nitsum_api.node.v1 import node_pb2
from nitsum_sglang import seam, wire, zygote
from nitsum_sglang.zygote_client import Zygote, environment, run_to_end

FIELDS = ["rids", "http_worker_ipcs", "finished_reasons", "decoded_texts", "decode_ids", "output_ids"]
FIELDS += [n for n in wire.WANTED if n not in FIELDS] + ["time_stats"]


def ids(*values: int) -> msgspec.msgpack.Ext:
    meta = msgspec.msgpack.encode("q")
    return msgspec.msgpack.Ext(1, struct.pack(">I", len(meta)) + meta + array("q", values).tobytes())


def batch(**columns: object) -> bytes:
    base: dict[str, object] = dict.fromkeys(FIELDS)
    base |= {"rids": ["a."], "finished_reasons": [None], "output_ids": [ids(7, 8)]}
    base |= {"prompt_tokens": [2], "completion_tokens": [2], "cached_tokens": [0], "reasoning_tokens": [0]}
    return msgspec.msgpack.encode(["BatchTokenIDOutput", *(base | columns).values()])


def deltas(data: bytes, live: bool = True, aborting: bool = False) -> list[node_pb2.TokenDelta]:
    return wire.deltas_of(wire.token_decoder(FIELDS)(data), lambda _: live, lambda _: aborting)


def test_tokens_and_logprobs() -> None:
    (delta,) = deltas(
        batch(
            output_token_logprobs_val=[[-1.5, None]],
            output_token_logprobs_idx=[[7, 8]],
            output_top_logprobs_val=[[[-1.5], None]],
            output_top_logprobs_idx=[[[7], None]],
        )
    )
    assert list(delta.token_ids) == [7, 8]
    assert delta.output_logprobs.values[0] == -1.5
    assert math.isnan(delta.output_logprobs.values[1])
    assert [list(t.token_ids) for t in delta.output_logprobs.top] == [[7], []]
    assert not delta.HasField("finish")


@pytest.mark.parametrize(
    ("reason", "aborting", "kind", "tokens"),
    [
        ({"type": "stop", "matched": 2}, False, node_pb2.Finish.KIND_STOP, 2),
        ({"type": "length", "length": 2}, True, node_pb2.Finish.KIND_LENGTH, 2),
        ({"type": "abort", "message": "Aborted"}, True, node_pb2.Finish.KIND_ABORTED, 0),
        ({"type": "abort", "message": "bad", "status_code": 400}, False, node_pb2.Finish.KIND_ERROR, 0),
    ],
)
def test_finish(reason: dict[str, object], aborting: bool, kind: int, tokens: int) -> None:
    (delta,) = deltas(batch(finished_reasons=[reason]), aborting=aborting)
    assert (delta.finish.kind, len(delta.token_ids)) == (kind, tokens)


def test_a_grammar_that_allows_nothing_is_the_clients_error_and_is_not_cited() -> None:
    message = "Grammar accept_token failed: Tokens not accepted: 7\nAccepted tokens: []\nKey string: {}"
    (delta,) = deltas(batch(finished_reasons=[{"type": "abort", "message": message, "status_code": 500}]))
    assert delta.finish.status_code == 400
    assert "Key string" not in delta.finish.message


def test_what_nobody_waits_for_is_dropped() -> None:
    assert deltas(batch(), live=False) == []


def test_a_missing_field_is_named() -> None:
    with pytest.raises(KeyError, match="cached_tokens"):
        wire.token_decoder([n for n in FIELDS if n != "cached_tokens"])


@pytest.mark.parametrize("request_", [{"target": "nothing"}, {"target": "a:b", "env": {"LD_PRELOAD": "x"}}, [], {"target": 1}])
def test_a_zygote_refuses(request_: object) -> None:
    with pytest.raises(ValueError, match=r"target|env"):
        zygote.checked(json.dumps(request_).encode())


def test_a_folder_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dir"):
        seam.addresses("/" + "x" * 120)


SELF_CHECK = """
import sys, threading
from nitsum_sglang import zygote
if sys.argv[1] == "thread":
    threading.Thread(target=threading.Event().wait, name="left over", daemon=True).start()
elif sys.argv[1]:
    __import__(sys.argv[1])
print(zygote.self_check())
"""


@pytest.mark.parametrize(("what", "reason"), [("", ""), ("thread", "threads before fork"), ("grpc", "grpc"), ("prometheus_client", "prom")])
def test_a_zygote_knows_when_it_must_not_fork(what: str, reason: str) -> None:
    out = subprocess.run([sys.executable, "-c", SELF_CHECK, what], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    assert bool(out) == bool(reason)
    assert out.startswith(reason)


@pytest.mark.parametrize("preload", ["json", "grpc"])
async def test_children_come_forked_or_fresh_and_end_alike(tmp_path: Path, preload: str) -> None:
    """grpc fails the zygote's self-check: then each child is a process of its own, with the same target, log and end."""
    z = Zygote(tmp_path / "z.sock", tmp_path / "zygote.log", preload=(preload,))
    await z.start()
    try:
        assert (z.forks, z.alive) == (preload == "json", True)
        child = await z.fork("builtins:print", {"said": 1}, log_path=tmp_path / "child.log")
        await asyncio.wait_for(asyncio.shield(child.exited), 20)
        assert "{'said': 1}" in (tmp_path / "child.log").read_text()
        bad = await z.fork("time:sleep", {}, log_path=tmp_path / "bad.log")
        await asyncio.wait_for(asyncio.shield(bad.exited), 20)
        assert "TypeError" in (tmp_path / "bad.log").read_text()
    finally:
        await z.stop()
    assert not (tmp_path / "z.sock").exists()


async def test_one_without_a_loop_asks_a_zygote_too(tmp_path: Path) -> None:
    z = Zygote(tmp_path / "z.sock", tmp_path / "zygote.log", preload=("json",))
    with pytest.raises(FileNotFoundError):
        run_to_end(z.socket_path, "builtins:print", {}, 10)
    await z.start()
    try:
        ask = functools.partial(asyncio.to_thread, run_to_end, z.socket_path)
        assert await ask("builtins:print", {"said": 1}, 10) == 0
        assert os.waitstatus_to_exitcode(await ask("time:sleep", {}, 10)) == 1
        with pytest.raises(ValueError, match="target"):
            await ask("nothing", {}, 10)
        with pytest.raises(TimeoutError, match="did not end"):
            await ask("multiprocessing.connection:wait", {}, 0.3)
    finally:
        await z.stop()


def test_engines_import_the_models_that_they_serve_and_no_others() -> None:
    unserved = environment()["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert len(unserved) > 100
    assert not {"llama", "mistral", "qwen2", "qwen3"} & set(unserved)
    assert {"deepseek_v2", "gpt_oss"} <= set(unserved)


def test_nothing_of_sglang_speaks_pickle() -> None:
    assert environment()["SGLANG_USE_PICKLE_IPC"] == "0"
