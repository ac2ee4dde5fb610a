"""Bounds the prefill tokens of a step that streams wait for, at run time: a stream waits for one small chunk, not for a prompt.

Stock SGLang prefills first: while a prompt is cut into chunks nothing decodes, so its chunk size alone does not shorten the wait. It looks
at `chunked_prefill_size` and `is_mixed_chunk` anew in every step, and so both are set for one step and set back: what else reads them
(memory of an admission) sees what the engine was started with, and no step is larger than its buffers. Mixing is asked for at the start,
for kernels to know, but off unless a budget is set. What stock refuses to mix (logprobs) takes turns with the decodes.

Caps on running requests by tier are the ledger's alone: it decides before a request is on the engine, knows tiers and moved streams, and
what it has let in holds KV already. An engine that held some back would queue behind the ledger's back and miss more TTFTs for it.

Every rank gets the budget by the same broadcast as requests, before the same step, so that all plan alike.
"""

import math
from typing import Any

from nitsum.governor import Room, room

KNOB = "nitsum_prefill_tokens_per_step"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SCHEDULER + "init_chunked_prefill", _start_ungoverned, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "set_internal_state", _set_budget, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "_should_defer_prefill", _take_turns, HookType.AROUND)
    HookRegistry.register(SCHEDULER + "get_new_batch_prefill", _bound, HookType.AROUND)


def _start_ungoverned(original: Any, self: Any) -> None:
    original(self)
    self.nitsum_budget, self.nitsum_decodes_waited = 0, False
    self.nitsum_mixes, self.is_mixed_chunk = self.is_mixed_chunk, False


def _set_budget(original: Any, self: Any, request: Any) -> Any:
    if KNOB not in request.server_args:
        return original(self, request)
    self.nitsum_budget = int(request.server_args[KNOB])
    return None  # no reply: what comes after it on the socket is carried out after it


def _room(self: Any, decodes: int) -> Room | None:
    """None: as stock."""
    chunk_max = self.chunked_prefill_size
    if not self.nitsum_budget or not decodes or chunk_max is None:
        return None
    align = math.lcm(self.page_size, self.truncation_align_size or 1)  # of smaller chunks nothing would be left
    return room(self.nitsum_budget, decodes, chunk_max, align, self.nitsum_mixes, self.nitsum_decodes_waited)


def _take_turns(original: Any, self: Any, running_batch: Any) -> bool:
    """True: this step is the decodes' alone."""
    allowed = _room(self, running_batch.batch_size())
    self.nitsum_decodes_waited = False
    return (allowed is not None and not allowed.tokens) or original(self, running_batch)


def _bound(original: Any, self: Any, running_batch: Any) -> Any:
    decodes = running_batch.batch_size()
    allowed = _room(self, decodes)
    if allowed is None:
        return original(self, running_batch)
    stock = self.chunked_prefill_size
    # Stock counts the decodes of a mixed step against its chunk.
    self.chunked_prefill_size, self.is_mixed_chunk = allowed.tokens + (decodes if allowed.mixed else 0), allowed.mixed
    try:
        plan = original(self, running_batch)
    finally:
        self.chunked_prefill_size, self.is_mixed_chunk = stock, False
    self.nitsum_decodes_waited = plan.batch_to_run is not None and not plan.batch_to_run.decoding_reqs
    return plan
