"""A moved request resumes as if this engine had generated its first k output tokens itself.

input_ids = prompt + output so far, and custom_params {RESUME_KEY: k}, which only our leader sets. The request is split again into
prompt and output, as after a stock retraction, so counts, stop strings, min_new_tokens, penalties and the grammar see the whole output.
An exception here ends that request alone: one inside a scheduler would end the engine.
"""

import dataclasses
import logging
from array import array
from typing import Any

from nitsum.faults import FaultPoint

from . import fault

log = logging.getLogger(__name__)

RESUME_KEY = "nitsum_resume"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in (
        ("managers.scheduler.Scheduler._create_generation_req", _split),
        ("managers.scheduler.Scheduler._add_request_to_queue", _advance_grammar),
        ("sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__", _replay_penalties),
    ):
        HookRegistry.register("sglang.srt." + target, hook, HookType.AROUND)


def _fail(req: Any, what: str) -> None:
    log.exception("exact resume: %s of %s", what, req.rid)
    req.set_finish_with_abort(f"the stream could not be resumed: {what}", status_code=500, err_type="InternalServerError")


def _split(original: Any, self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    req = original(self, recv_req, *args, **kwargs)
    params = req.sampling_params.custom_params or {}
    k = int(params.pop(RESUME_KEY, 0))
    req.sampling_params.custom_params = params or None
    if k:
        fault.visit(FaultPoint.ENGINE_RESUMING)
        try:
            _split_at(self, req, k)
        except Exception:
            _fail(req, "split")
    return req


def _split_at(scheduler: Any, req: Any, k: int) -> None:
    ids = req.origin_input_ids
    if not 0 < k < len(ids):
        raise ValueError(f"resume_k {k} of {len(ids)} tokens")
    req.origin_input_ids, req.output_ids = ids[:-k], ids[-k:]
    req.origin_input_ids_unpadded = req.origin_input_ids
    req.send_token_offset, req.nitsum_replay = k, True
    req.nitsum_lag = scheduler.enable_overlap  # then stock penalties lag one token behind and begin with the prompt's last
    if not req.return_logprob:
        return
    # Those of the first k tokens, and of the prompt, are already with the client.
    req.send_output_token_logprobs_offset, req.input_logprob_sent = k, True
    for f in dataclasses.fields(req.logprob):
        value = getattr(req.logprob, f.name)
        if f.name.startswith("output_") and isinstance(value, list):
            value.extend([None] * k)
        elif f.name.startswith("input_") and f.name.endswith(("_val", "_idx")):
            setattr(req.logprob, f.name, [])


def _advance_grammar(original: Any, self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(req, "nitsum_replay", False):
        req.nitsum_replay = False
        try:
            if req.return_logprob:  # at the prompt's length the prefix cache would be cut and the whole output computed again
                req.logprob_start_len = -1
            if req.grammar is not None:
                for token in req.output_ids:
                    req.grammar.accept_token(token)
        except Exception:
            req.output_ids = array("q")
            _fail(req, "grammar")
    return original(self, req, *args, **kwargs)


class _Batch:
    """What a penalizer asks of a batch, for one request alone."""

    def __init__(self, req: Any, device: Any) -> None:
        self.reqs, self.device = [req], device


def _replay_penalties(original: Any, self: Any, vocab_size: int, batch: Any, penalizers: Any) -> None:
    """Stock penalizers start from zero on every prefill, so a retracted request loses its history too."""
    original(self, vocab_size, batch, penalizers)
    if not self.is_required:
        return
    for i, req in enumerate(batch.reqs):
        try:
            _replay_one(original, self, vocab_size, batch, penalizers, i, req)
        except Exception:
            from sglang.srt.managers.schedule_batch import FINISH_ABORT

            log.exception("exact resume: penalties of %s", req.rid)
            req.to_finish = FINISH_ABORT("the stream could not be resumed: penalties", 500, "InternalServerError")


def _replay_one(original: Any, self: Any, vocab_size: int, batch: Any, penalizers: Any, i: int, req: Any) -> None:
    import torch

    sampling = req.sampling_params
    penalised = sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1 or sampling.min_new_tokens
    if not len(req.output_ids) or not penalised:
        return
    alone = object.__new__(type(self))
    alone_batch = _Batch(req, batch.device)  # the penalizers hold it by weak reference
    original(alone, vocab_size, alone_batch, penalizers)
    tokens = [req.origin_input_ids[-1], *req.output_ids[:-1]] if getattr(req, "nitsum_lag", False) else req.output_ids
    for token in tokens:
        alone.cumulate_output_tokens(torch.tensor([token], device=batch.device))
    rows = len(batch.reqs)
    for kind, mine in self.penalizers.items():
        for name, value in vars(mine).items():
            replayed = vars(alone.penalizers[kind]).get(name)
            if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) and isinstance(replayed, torch.Tensor):
                value[i] = replayed[0]
