"""Our protobuf to SGLang's requests, inside the leader. What is not translated here cannot reach a scheduler."""

from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from nitsum_api.limits import excess
from nitsum_api.node.v1 import node_pb2
from nitsum_sglang import seam
from nitsum_sglang.plugins.exact_resume import RESUME_KEY
from nitsum_sglang.plugins.governor import KNOB


class Requests:
    def __init__(self, tokenizer: Any, vocab_size: int, priorities: bool) -> None:
        from sglang.srt.managers import io_struct
        from sglang.srt.sampling.sampling_params import SamplingParams

        self.io, self.sampling_params = io_struct, SamplingParams
        self.tokenizer, self.vocab_size, self.priorities = tokenizer, vocab_size, priorities

    def fields(self) -> dict[str, list[str]]:
        """Field order of what the schedulers send: their wire structs are positional."""
        names = ("BatchTokenIDOutput", "AbortReq", "FlushCacheReqOutput")
        return {name: [f.name for f in msgspec.structs.fields(getattr(self.io, name))] for name in names}

    def handle(self, frame: list[bytes], send: Callable[[bytes], Any]) -> dict[str, Any] | None:
        """Carries one frame of the host out. Returns an answer for it, or None."""
        kind, io = frame[0], self.io
        if kind == seam.SUBMIT:
            rid = frame[1].decode()
            try:
                request = self.generate(rid, int(frame[2]), node_pb2.Submit.FromString(frame[3]))
                data = io.msgpack_encode(request)
            except Exception as error:  # of this request alone, whatever it is
                client = isinstance(error, ValueError)
                return {"rid": rid, "status": 400 if client else 500, "error": str(error) if client else f"{type(error).__name__}: {error}"}
            send(data)
        elif kind == seam.ABORT:
            send(io.msgpack_encode(io.AbortReq(rid=frame[1].decode())))
        elif kind == seam.ABORT_ALL:
            send(io.msgpack_encode(io.AbortReq(abort_all=True)))
        elif kind == seam.PAUSE:
            send(io.msgpack_encode(io.PauseGenerationReqInput(rid=frame[1].decode(), mode="in_place")))
        elif kind == seam.CONTINUE:
            send(io.msgpack_encode(io.ContinueGenerationReqInput(rid=frame[1].decode(), torch_empty_cache=False)))
        elif kind == seam.FLUSH:
            send(io.msgpack_encode(io.FlushCacheReqInput()))
        elif kind == seam.GOVERN:
            send(io.msgpack_encode(io.SetInternalStateReq(server_args={KNOB: int(frame[1])})))
        else:
            raise ValueError(f"unknown frame {kind!r}")
        return None

    def generate(self, rid: str, priority: int, submit: node_pb2.Submit) -> Any:
        """Raises ValueError that says which field is wrong: a bad id inside a scheduler would end the engine."""
        ids = array("q", submit.input_ids)
        if not ids:
            raise ValueError("input_ids: empty")
        if max(ids) >= self.vocab_size:
            raise ValueError(f"input_ids: token {max(ids)} is outside the vocabulary of {self.vocab_size}")
        if submit.resume_k >= len(ids):
            raise ValueError(f"resume_k: {submit.resume_k} of {len(ids)} tokens leaves no prompt")
        wanted = submit.logprobs
        if any(token >= self.vocab_size for token in (*wanted.token_ids, *submit.sampling.stop_token_ids)):
            raise ValueError(f"token_ids: outside the vocabulary of {self.vocab_size}")
        if wanted.top > self.vocab_size:
            raise ValueError(f"logprobs.top: {wanted.top} exceeds the vocabulary of {self.vocab_size}")
        if (message := excess(submit.sampling)) is not None:
            raise ValueError(message)
        return_logprob = submit.HasField("logprobs")
        if return_logprob and wanted.start >= len(ids) - submit.resume_k:
            raise ValueError(f"logprobs.start: {wanted.start} is past the prompt")
        return self.io.TokenizedGenerateReqInput(
            rid=rid,
            input_text=None,
            input_ids=ids,
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=self.sampling(submit.sampling, submit.resume_k),
            return_logprob=return_logprob,
            logprob_start_len=max(-1, wanted.start) if return_logprob else -1,
            top_logprobs_num=wanted.top if return_logprob else 0,
            token_ids_logprob=list(wanted.token_ids) or None if return_logprob else None,
            stream=True,
            require_reasoning=submit.sampling.require_reasoning,
            priority=priority if self.priorities else None,
            cache_salt=submit.cache_salt or None,
        )

    def sampling(self, s: node_pb2.Sampling, resume_k: int) -> Any:
        grammar = s.WhichOneof("grammar")
        params = self.sampling_params(
            max_new_tokens=s.max_new_tokens or None,
            min_new_tokens=s.min_new_tokens,
            temperature=s.temperature,
            top_p=s.top_p or 1.0,
            top_k=s.top_k or -1,
            min_p=s.min_p,
            frequency_penalty=s.frequency_penalty,
            presence_penalty=s.presence_penalty,
            repetition_penalty=s.repetition_penalty or 1.0,
            stop=list(s.stop) or None,
            stop_regex=list(s.stop_regex) or None,
            stop_token_ids=set(s.stop_token_ids) or None,
            ignore_eos=s.ignore_eos,
            no_stop_trim=s.no_stop_trim,
            skip_special_tokens=s.skip_special_tokens,
            spaces_between_special_tokens=s.spaces_between_special_tokens,
            logit_bias=dict(s.logit_bias) or None,
            sampling_seed=s.seed if s.HasField("seed") else None,
            custom_params={RESUME_KEY: resume_k} if resume_k else None,
            **({grammar: getattr(s, grammar)} if grammar else {}),
        )
        params.normalize(self.tokenizer)
        params.verify(self.vocab_size)
        return params
