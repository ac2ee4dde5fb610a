"""What schedulers send, decoded just as far as we need it and turned into protobuf. Imports nothing of SGLang.

Their structs are positional msgpack; the leader names the field order. SGLang's own decoder costs 2-3 us a token, this one a quarter.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.node.v1 import node_pb2

LOGPROBS = tuple(
    f"{way}_{kind}_{part}"
    for way in ("input", "output")
    for kind in ("token_logprobs", "top_logprobs", "token_ids_logprobs")
    for part in ("val", "idx")
)
WANTED: dict[str, Any] = {
    "rids": list[str],
    "finished_reasons": list[dict[str, Any] | None],
    "output_ids": list[msgspec.msgpack.Ext],
    "prompt_tokens": list[int],
    "reasoning_tokens": list[int],
    "completion_tokens": list[int],
    "cached_tokens": list[int],
    **dict.fromkeys(LOGPROBS, Any),
}


def token_decoder(fields: list[str]) -> Callable[[bytes], Any]:
    """Decoder of BatchTokenIDOutput. Raises KeyError when the field order lacks one that we need."""
    missing = set(WANTED) - set(fields)
    if missing:
        raise KeyError(f"BatchTokenIDOutput lacks {sorted(missing)}")
    last = max(fields.index(name) for name in WANTED)
    slim = msgspec.defstruct(
        "BatchTokenIDOutput",
        [(name, WANTED.get(name, msgspec.Raw)) for name in fields[: last + 1]],
        array_like=True,
        tag="BatchTokenIDOutput",
        gc=False,
    )
    return msgspec.msgpack.Decoder(slim).decode


def ids_of(ext: msgspec.msgpack.Ext) -> list[int]:
    """An array("q") on the wire: 4 bytes length of the metadata, the metadata ("q" in msgpack), raw int64."""
    data = memoryview(ext.data)
    return data[4 + int.from_bytes(data[:4], "big") :].cast("q").tolist()


def reply_of(data: bytes, fields: dict[str, list[str]]) -> tuple[str, dict[str, Any]]:
    """(type, fields) of a message on the reply socket; of an unknown type, no fields."""
    values = msgspec.msgpack.decode(data)
    name = values[0] if isinstance(values, list) and values and isinstance(values[0], str) else ""
    return name, dict(zip(fields.get(name, []), values[1:], strict=False))


def timings_of(message: str) -> tuple[agent_pb2.StepTiming, ...]:
    """What `plugins/step_times.py` says."""
    return tuple(
        agent_pb2.StepTiming(phase=phase, batch=round(batch), tokens=round(tokens), context=round(context), mean_ms=ms, count=count)
        for phase, batch, tokens, context, ms, count in json.loads(message)
    )


NO_TOKEN = "Grammar accept_token failed"
"""A grammar that allows no token at all ({"$ref": "#"}): SGLang calls it an error of its own, and cites the grammar."""


def finish_of(reason: dict[str, Any], aborted_by_us: bool) -> node_pb2.Finish:
    kind, matched = reason.get("type"), reason.get("matched")
    if kind == "stop":
        finish = node_pb2.Finish(kind=node_pb2.Finish.KIND_STOP)
        if isinstance(matched, list):
            matched = matched[-1] if matched else None
        if isinstance(matched, str):
            finish.matched_text = matched
        elif isinstance(matched, int):
            finish.matched_token_id = matched
        return finish
    if kind == "length":
        return node_pb2.Finish(kind=node_pb2.Finish.KIND_LENGTH)
    message = str(reason.get("message") or "")
    if kind == "abort" and aborted_by_us:
        return node_pb2.Finish(kind=node_pb2.Finish.KIND_ABORTED, message=message)
    if message.startswith(NO_TOKEN):
        return error("grammar: no text that satisfies the schema, regex or grammar can continue this output", 400)
    status = reason.get("status_code")
    return error(message or f"the engine ended the request: {kind}", int(status) if status else 500)


def error(message: str, status: int) -> node_pb2.Finish:
    return node_pb2.Finish(kind=node_pb2.Finish.KIND_ERROR, message=message, status_code=status)


def deltas_of(batch: Any, live: Callable[[str], bool], aborting: Callable[[str], bool]) -> list[node_pb2.TokenDelta]:
    """One delta per request of the step that is live; a chunk that ends with an abort carries no tokens."""
    deltas = []
    for i, rid in enumerate(batch.rids):
        if not live(rid):
            continue
        reason = batch.finished_reasons[i]
        delta = node_pb2.TokenDelta(
            request_id=rid,
            prompt_tokens=batch.prompt_tokens[i],
            completion_tokens=batch.completion_tokens[i],
            cached_tokens=batch.cached_tokens[i],
            reasoning_tokens=batch.reasoning_tokens[i],
        )
        if reason is not None:
            delta.finish.CopyFrom(finish_of(reason, aborting(rid)))
        if reason is None or reason.get("type") != "abort":
            delta.token_ids.extend(ids_of(batch.output_ids[i]))
            _logprobs(batch, i, "input", delta)
            _logprobs(batch, i, "output", delta)
        deltas.append(delta)
    return deltas


def _logprobs(batch: Any, i: int, way: str, delta: node_pb2.TokenDelta) -> None:
    values = _row(batch, f"{way}_token_logprobs_val", i)
    if not values:
        return
    rows = delta.input_logprobs if way == "input" else delta.output_logprobs
    rows.values.extend(_floats(values))
    rows.token_ids.extend(int(t or 0) for t in _row(batch, f"{way}_token_logprobs_idx", i) or ())
    for kind, into in (("top", rows.top), ("token_ids", rows.wanted)):
        alternatives = _row(batch, f"{way}_{kind}_logprobs_val", i) or ()
        ids = _row(batch, f"{way}_{kind}_logprobs_idx", i) or ()
        for some, tokens in zip(alternatives, ids, strict=False):
            into.append(node_pb2.TopLogprobs(values=_floats(some or ()), token_ids=[int(t) for t in tokens or ()]))


def _row(batch: Any, name: str, i: int) -> Any:
    column = getattr(batch, name)
    return column[i] if column else None


def _floats(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]
