"""Step times, memory and flip cost by (model, GPU, TP): the ports that planner, ledger and simulator use."""

from typing import Protocol, runtime_checkable

from nitsum.layout import FlipMode


class StepTimeModel(Protocol):
    """Of one model on one GPU type. All times are milliseconds of one engine step; ctx and chunk are tokens.

    Implementations raise KeyError for a TP degree that they hold no data for.
    """

    @property
    def origin(self) -> str:
        """`modelled` or `measured`."""
        ...

    @property
    def tp_sizes(self) -> tuple[int, ...]: ...

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        """One prefill step of `chunk` new tokens behind `ctx` cached ones."""
        ...

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        """One decode step of `batch` sequences of mean length `ctx`."""
        ...

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        """One step that carries `chunk` prefill tokens and `batch` decodes."""
        ...

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        """KV tokens that one engine of this TP holds when engines of `resident_tp` share its GPUs."""
        ...


@runtime_checkable
class KvLoad(Protocol):
    def load_ms(self, tokens: int, tp_size: int) -> float | None:
        """From a node's KV store into a group of this TP, beside its steps; None: KV is not kept."""
        ...


class FlipCost(Protocol):
    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        """Time in which the flipped GPUs yield nothing: end of A's streams, park, wake, KV copied or computed again.

        `resident_tokens` of one group that ends; where to_tp > from_tp, its neighbours' that B takes in too are assumed to be as many.
        """
        ...


def door_ms(model: StepTimeModel, tp_size: int) -> float:
    """What a request waits outside the engine's steps; 0 for models that do not say."""
    says = getattr(model, "door_ms", None)
    return float(says(tp_size)) if says is not None else 0.0
