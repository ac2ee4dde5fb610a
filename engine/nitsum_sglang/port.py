"""The engine as the host sees it: a declared port. `SchedulerEngine` (real SGLang) and the tests' fake pass the same contract test.

Tokens leave as protobuf deltas of the node data port, one list per engine step, so that the host copies nothing.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.node.v1 import node_pb2


@dataclass(frozen=True)
class EngineSpec:
    """All that a start needs. Paths are absolute; `gpu_uuids[i]` is the GPU of rank i."""

    engine_id: str
    model_path: str
    revision: str
    tp_size: int
    gpu_uuids: tuple[str, ...]
    state_dir: str
    """A folder of the engine's own, mode 0700: sockets, log (`engine.log`), wake and park times (`awake.jsonl`)."""
    device: str = "cpu"
    max_total_tokens: int = 8192
    dtype: str = ""
    """float32, bfloat16 or float16; empty: as the checkpoint says. A stream that moves between TP degrees is equal to the last token to
    one that did not only in float32: sums of the others depend on how they are split."""
    context_length: int = 0
    """0: as the checkpoint's config says."""
    weight_socket: str = ""
    """Unix socket of the weight store; empty: the engine loads the checkpoint itself."""
    kv_dir: str = ""
    """Folder of the KV store that this node's engines share; empty: none."""
    seed_exact: bool = False
    """Seeded sampling that does not depend on the batch (slower)."""
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineInfo:
    max_total_tokens: int
    max_req_input_len: int
    pids: tuple[int, ...]
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRequest:
    """`rid` must end in a character that no other rid continues (`.`): SGLang aborts by prefix."""

    rid: str
    submit: node_pb2.Submit
    priority: int = 0


@dataclass(frozen=True)
class Limits:
    """What one step may do. Zero: not limited."""

    prefill_tokens_per_step: int = 0
    """Beside streams that decode."""


@dataclass(frozen=True)
class Timings:
    """Means of the steps of the last second or so in which the engine worked. `serial` grows with each; 0: there is none yet."""

    serial: int = 0
    steps: tuple[agent_pb2.StepTiming, ...] = ()


class EngineEnded(Exception):
    """The engine's processes ended unasked; what ran on it is lost, its tokens are not."""


class Engine(Protocol):
    """Starts parked. Commands are idempotent; none raises but EngineEnded."""

    spec: EngineSpec
    timings: Timings

    async def start(self) -> EngineInfo:
        """Returns when the schedulers are loaded. Raises EngineEnded with the log's tail when they are not."""
        ...

    async def wake(self) -> None:
        """Lets the engine step. Returns when it has said so (awake.jsonl)."""
        ...

    async def park(self) -> None:
        """Ends stepping at once. Work left in it is aborted first: a parked engine holds none."""
        ...

    def govern(self, limits: Limits) -> None:
        """Before whatever it is told next, awake or parked, and until it is told otherwise; a started engine has none. Changes no token."""
        ...

    def submit(self, request: EngineRequest) -> None: ...

    def abort(self, rid: str) -> None:
        """Ends one request; its last delta carries KIND_ABORTED. An unknown rid is ignored."""
        ...

    def steps(self) -> AsyncIterator[list[node_pb2.TokenDelta]]:
        """Deltas of each engine step, request_id = rid. Raises EngineEnded when the engine dies. One reader only.

        A chunk that ends with an abort carries no tokens: they went unchecked for EOS and stop, and are made again elsewhere.
        """
        ...

    async def flush_cache(self) -> bool:
        """Empties the prefix cache; False while work runs."""
        ...

    async def stop(self) -> None:
        """Ends every process of the engine and removes its sockets and shared memory."""
        ...
