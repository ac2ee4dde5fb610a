"""Every name and field of SGLang that we touch, in one list. Wire structs are positional: one version is pinned, the rest is checked.

Checked when a zygote starts, so that an incompatible SGLang is named before any engine is asked for.
"""

import importlib
from collections.abc import Iterable
from importlib import metadata
from typing import Any

VERSION = "0.5.23"

NAMES = (
    "sglang.srt.plugins:load_plugins",
    "sglang.srt.plugins.hook_registry:HookRegistry.register",
    "sglang.srt.plugins.hook_registry:HookType.AROUND",
    "sglang.srt.runtime_context:publish",
    "sglang.srt.runtime_context:get_parallel",
    "sglang.srt.server_args:prepare_server_args",
    "sglang.srt.server_args:PortArgs.init_new",
    "sglang.srt.server_args:ServerArgs.resolve_once",
    "sglang.srt.server_args:ServerArgs.check_server_args",
    "sglang.srt.server_args:DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
    "sglang.srt.server_args:RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
    "sglang.srt.managers.scheduler:run_scheduler_process",
    "sglang.srt.managers.scheduler:Scheduler.run_event_loop",
    "sglang.srt.managers.scheduler:Scheduler.pause_generation",
    "sglang.srt.managers.scheduler:Scheduler.continue_generation",
    "sglang.srt.managers.scheduler:Scheduler.send_control_output",
    "sglang.srt.managers.scheduler:Scheduler._record_scheduler_state_for_paused_engine",
    "sglang.srt.managers.scheduler:Scheduler.init_chunked_prefill",
    "sglang.srt.managers.scheduler:Scheduler.set_internal_state",
    "sglang.srt.managers.scheduler:Scheduler._should_defer_prefill",
    "sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
    "sglang.srt.managers.scheduler:Scheduler.process_batch_result",
    "sglang.srt.managers.scheduler:Scheduler._create_generation_req",
    "sglang.srt.managers.scheduler:Scheduler._add_request_to_queue",
    "sglang.srt.managers.schedule_batch:Req.set_finish_with_abort",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.launch_ts",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.seq_lens_cpu",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.extend_lens",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.prefix_lens",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.decoding_reqs",
    "sglang.srt.managers.schedule_batch:FINISH_ABORT",
    "sglang.srt.managers.io_struct:msgpack_encode",
    "sglang.srt.sampling.sampling_params:SamplingParams.normalize",
    "sglang.srt.sampling.sampling_params:SamplingParams.verify",
    "sglang.srt.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator.__init__",
    "sglang.srt.layers.sampler:murmur_hash32",
    "sglang.srt.model_executor.model_runner:ModelRunner.maybe_enable_batch_invariant_mode",
    "sglang.srt.disaggregation.common.conn:CommonKVReceiver._ctx",
    "sglang.srt.utils.hf_transformers_utils:get_tokenizer",
    "sglang.srt.managers.io_struct",
    "sglang.srt.models.registry",
    "sglang.srt.layers.rotary_embedding:get_rope",
    "sglang.srt.mem_cache.hicache_storage:PoolName",
    "sglang.srt.mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinker",
    "sglang.srt.weight_cache.ipc_loader:get_client_transport_backend",
    "sglang.srt.platforms.cpu:CpuDeviceMixin",
    "sglang.srt.platforms.device_mixin:PlatformEnum",
    "sglang.srt.platforms.interface:PlatformCapabilities",
    "sglang.srt.platforms.interface:SRTPlatform",
)

FRONT_NAMES = (
    "sglang.srt.entrypoints.http_server:launch_server",
    "sglang.srt.entrypoints.engine:_set_envs_and_config",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_abort_finish_reason",
    "sglang.srt.managers.io_struct:async_sock_recv",
    "sglang.srt.managers.io_struct:sock_send",
    "sglang.srt.utils:kill_itself_when_parent_died",
    "sglang.srt.utils.hf_transformers_utils:get_config",
    "sglang.srt.utils.hf_transformers_utils:get_context_length",
    "sglang.srt.utils.network:get_zmq_socket",
)
"""Used by fronts alone: an engine need not load them."""

FIELDS = {
    "sglang.srt.managers.io_struct:TokenizedGenerateReqInput": (
        "rid input_ids sampling_params return_logprob logprob_start_len top_logprobs_num token_ids_logprob stream "
        "require_reasoning priority cache_salt"
    ),
    "sglang.srt.managers.io_struct:BatchTokenIDOutput": (
        "rids finished_reasons output_ids prompt_tokens reasoning_tokens completion_tokens cached_tokens "
        "input_token_logprobs_val input_token_logprobs_idx output_token_logprobs_val output_token_logprobs_idx "
        "input_top_logprobs_val input_top_logprobs_idx output_top_logprobs_val output_top_logprobs_idx "
        "input_token_ids_logprobs_val input_token_ids_logprobs_idx output_token_ids_logprobs_val output_token_ids_logprobs_idx"
    ),
    "sglang.srt.managers.io_struct:AbortReq": "rid abort_all finished_reason",
    "sglang.srt.managers.io_struct:PauseGenerationReqInput": "rid mode",
    "sglang.srt.managers.io_struct:ContinueGenerationReqInput": "rid torch_empty_cache",
    "sglang.srt.managers.io_struct:FlushCacheReqInput": "rid",
    "sglang.srt.managers.io_struct:SetInternalStateReq": "server_args",
    "sglang.srt.managers.io_struct:FlushCacheReqOutput": "rid success message",
    "sglang.srt.sampling.sampling_params:SamplingParams": (
        "max_new_tokens min_new_tokens temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty stop "
        "stop_regex stop_token_ids ignore_eos no_stop_trim skip_special_tokens spaces_between_special_tokens json_schema regex ebnf "
        "structural_tag logit_bias sampling_seed custom_params"
    ),
}


class IncompatibleEngine(Exception):
    """The installed SGLang is not the one that this release was written against."""


def lookup(path: str) -> Any:
    module, _, name = path.partition(":")
    value: Any = importlib.import_module(module)
    for part in name.split(".") if name else ():
        value = vars(value).get(part, None) if part == "_ctx" else getattr(value, part)
    return value


def check(names: Iterable[str] = NAMES) -> None:
    """Raises IncompatibleEngine that names everything missing."""
    installed = metadata.version("sglang")
    problems = []
    if installed != VERSION:
        problems.append(f"version {installed}, wanted {VERSION}: install sglang=={VERSION}")
    for path in names:
        try:
            lookup(path)
        except (ImportError, AttributeError) as error:
            problems.append(f"{path}: {error}")
    for path, fields in FIELDS.items():
        try:
            missing = set(fields.split()) - set(lookup(path).__struct_fields__)
        except (ImportError, AttributeError) as error:
            problems.append(f"{path}: {error}")
            continue
        problems.extend(f"{path} has no field {name}" for name in sorted(missing))
    if problems:
        raise IncompatibleEngine("SGLang is not the one nitsum knows: " + "; ".join(problems))
