"""GPU memory of a node's layouts. Residency: one copy of the smallest resident TP's shard on each GPU, larger TPs are views of it;
each resident engine holds about 3 GB besides (CUDA context, graphs, communicators); what is left is KV of the one that is awake.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from nitsum.perf import StepTimeModel

ENGINE_BYTES = 3_000_000_000
KV_FRACTION = 0.85
"""Of what is left for KV: fragments and safety. An 8B at TP1 alone on 80 GB then gets within 2 % of what SGLang takes by default."""


@dataclass(frozen=True)
class RankMemory:
    """Of one rank at one TP."""

    weight_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int = 0


@dataclass(frozen=True)
class GpuMemory:
    """`gpu_bytes` of one GPU; `engine_bytes` of each resident engine besides weights and KV."""

    gpu_bytes: int
    engine_bytes: int = ENGINE_BYTES
    kv_fraction: float = KV_FRACTION

    def kv_tokens(self, rank: dict[int, RankMemory], tp_size: int, resident_tp: tuple[int, ...]) -> int:
        """KV tokens of a whole engine of `tp_size`; 0 where it does not fit. A GPU is in one engine of each resident TP."""
        resident = {*resident_tp, tp_size}
        smallest = min(resident)
        # A TP whose shards do not nest in the smallest one's needs its own copy.
        copies = [smallest, *(tp for tp in resident if tp % smallest)]
        weights = sum(rank[tp].weight_bytes for tp in copies)
        left = self.gpu_bytes - weights - len(resident) * self.engine_bytes - max(rank[tp].activation_bytes for tp in resident)
        return max(int(left * self.kv_fraction) // rank[tp_size].kv_bytes_per_token, 0)


WORTH = 0.5
"""Of the KV tokens that the next larger TP would have without it: where the smallest leaves less, it is not worth its copy of weights."""


def worth_residing(model: StepTimeModel, tp_sizes: Iterable[int]) -> tuple[int, ...]:
    """Which of a pool's legal degrees to keep resident. The smallest decides how much of a GPU the one copy of the weights takes (a 32B's
    at TP1 leaves 4 GB of 80), and to change it is a cold operation, so it is chosen by memory alone, not by demand."""
    kept = tuple(sorted(set(tp_sizes)))
    while len(kept) > 1 and model.kv_capacity_tokens(kept[1], kept) < WORTH * model.kv_capacity_tokens(kept[1], kept[1:]):
        kept = kept[1:]
    return kept
