"""Tokens of the node port -> what SGLang's detokenizer expects of a scheduler: one message per engine step, not one per token."""

import math
from array import array
from dataclasses import dataclass
from typing import Any

from nitsum_api.node.v1 import node_pb2

SURROUND = 5
"""Prompt tokens that the detokenizer gets with the first output, as SGLang's own scheduler sends them."""


@dataclass
class Row:
    """What one request got in one step."""

    request: Any
    ids: list[int]
    first: bool
    output_tokens: int
    """So far, this step included."""
    finish: dict[str, Any] | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    input_logprobs: node_pb2.LogprobRows | None = None
    output_logprobs: node_pb2.LogprobRows | None = None


def finish_of(finish: node_pb2.Finish, output_tokens: int) -> dict[str, Any]:
    """A normal end, as SGLang writes it."""
    if finish.kind == node_pb2.Finish.KIND_LENGTH:
        return {"type": "length", "length": output_tokens}
    matched = finish.WhichOneof("matched")
    return {"type": "stop", "matched": getattr(finish, matched) if matched else None}


def failure(status: int, message: str) -> dict[str, Any]:
    kinds = {400: "BadRequestError", 429: "RateLimitError", 503: "ServiceUnavailableError"}
    return {"type": "abort", "message": message, "status_code": status, "err_type": kinds.get(status, "InternalServerError")}


class Emitter:
    """`send` takes a BatchTokenIDOutput."""

    def __init__(self, io: Any, fields: list[Any], send: Any) -> None:
        self.message, self.send = io.BatchTokenIDOutput, send
        self.blank = {f.name: None for f in fields if f.required}

    def emit(self, rows: list[Row]) -> None:
        """Requests with and without logprobs go apart: those columns are all or nothing."""
        for some in ([r for r in rows if not r.request.return_logprob], [r for r in rows if r.request.return_logprob]):
            if some:
                self.send(self.message(**self._columns(some)))

    def _columns(self, rows: list[Row]) -> dict[str, Any]:
        prompts = [list(r.request.input_ids[-SURROUND:]) for r in rows]
        params = [r.request.sampling_params for r in rows]
        v = dict(self.blank)
        v.update(
            rids=[r.request.rid for r in rows],
            http_worker_ipcs=[r.request.http_worker_ipc for r in rows],
            finished_reasons=[r.finish for r in rows],
            decoded_texts=[""] * len(rows),
            output_ids=[array("q", r.ids) for r in rows],
            decode_ids=[array("q", (p if r.first else []) + r.ids) for r, p in zip(rows, prompts, strict=True)],
            read_offsets=[len(p) for p in prompts],
            skip_special_tokens=[p.skip_special_tokens for p in params],
            spaces_between_special_tokens=[p.spaces_between_special_tokens for p in params],
            no_stop_trim=[p.no_stop_trim for p in params],
            prompt_tokens=[len(r.request.input_ids) for r in rows],
            completion_tokens=[r.output_tokens for r in rows],
            retraction_counts=[0] * len(rows),
            reasoning_tokens=[r.reasoning_tokens for r in rows],
            cached_tokens=[r.cached_tokens for r in rows],
        )
        if rows[0].request.return_logprob:
            for way in ("input", "output"):
                self._logprobs(v, way, [getattr(r, f"{way}_logprobs") or node_pb2.LogprobRows() for r in rows])
        return v

    @staticmethod
    def _logprobs(v: dict[str, Any], way: str, rows: list[node_pb2.LogprobRows]) -> None:
        v[f"{way}_token_logprobs_val"] = [[_number(x) for x in r.values] for r in rows]
        v[f"{way}_token_logprobs_idx"] = [list(r.token_ids) for r in rows]
        for kind, field in (("top", "top"), ("token_ids", "wanted")):
            several = [getattr(r, field) for r in rows]
            v[f"{way}_{kind}_logprobs_val"] = [[[_number(x) for x in p.values] if p.token_ids else None for p in s] for s in several]
            v[f"{way}_{kind}_logprobs_idx"] = [[list(p.token_ids) if p.token_ids else None for p in s] for s in several]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
