"""A request as SGLang's front end tokenized it -> the node port's protobuf. A field that is not named here cannot reach an engine."""

from typing import Any

from nitsum_api.node.v1 import node_pb2

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


def listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def sampling_of(request: Any, context_length: int) -> node_pb2.Sampling:
    """`request`: TokenizedGenerateReqInput. No max_new_tokens means: as long as the context lasts; the engine may end it earlier.

    Zero (only the prompt's logprobs are wanted) travels as one: engines take zero for no limit.
    """
    p = request.sampling_params
    room = max(context_length - len(request.input_ids), 1)
    s = node_pb2.Sampling(
        max_new_tokens=room if p.max_new_tokens is None else min(max(p.max_new_tokens, 1), room),
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        min_p=p.min_p,
        frequency_penalty=p.frequency_penalty,
        presence_penalty=p.presence_penalty,
        repetition_penalty=p.repetition_penalty,
        min_new_tokens=p.min_new_tokens,
        stop=listed(p.stop_strs),
        stop_regex=listed(p.stop_regex_strs),
        stop_token_ids=sorted(p.stop_token_ids or ()),
        ignore_eos=p.ignore_eos,
        no_stop_trim=p.no_stop_trim,
        skip_special_tokens=p.skip_special_tokens,
        spaces_between_special_tokens=p.spaces_between_special_tokens,
        logit_bias=p.logit_bias or {},
        require_reasoning=request.require_reasoning,
    )
    if p.sampling_seed is not None:
        s.seed = p.sampling_seed
    for name in GRAMMARS:
        if value := getattr(p, name):
            setattr(s, name, value)
    return s


def logprobs_of(request: Any) -> node_pb2.Logprobs | None:
    if not request.return_logprob:
        return None
    return node_pb2.Logprobs(
        start=max(request.logprob_start_len, -1), top=request.top_logprobs_num, token_ids=request.token_ids_logprob or ()
    )
