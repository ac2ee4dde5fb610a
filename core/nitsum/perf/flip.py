"""What a flip costs: a fixed part, and KV that is kept, copied or computed again.

Fixed part (modelled, 150 ms): A's streams end in 23-63 ms (measured on CPU), routes and directives about 25 ms (measured on CPU: gap of a
flip less B's own prefill, docs/benchmarks.md), and KV memory unmapped from A and mapped to B (allowed 60 ms; SGLang's memory saver took
0.08/0.47 s with weights for a 32B model elsewhere).

Copy: A's pages are in the node's store before it stops (written beside its steps), so the pause holds one way, store to GPU: each GPU's
PCIe link, and the host's memory for all GPUs of the flip together. 8B at TP1, 128 streams of 2k: 34 GB a GPU, 0.7 s. With `path` peer the
GPUs exchange heads over NVLink instead: 1 - min/max of the two TPs of each GPU's bytes (the paper: 3.6-24.8 ms a migration).
"""

from dataclasses import dataclass
from enum import StrEnum


class KvFate(StrEnum):
    KEPT = "Kept"
    COPIED = "Copied"
    RECOMPUTED = "Recomputed"


class KvPath(StrEnum):
    HOST = "host"
    PEER = "peer"


@dataclass(frozen=True)
class FlipRates:
    """Rates that are really reached, in bytes per second: `pcie` and `nvlink` of one GPU one way, `host` of a node's memory."""

    fixed_ms: float = 150.0
    origin: str = "modelled"
    path: KvPath = KvPath.HOST
    pcie_bytes_per_s: float = 50e9
    host_bytes_per_s: float = 200e9
    nvlink_bytes_per_s: float = 360e9

    def load_ms(self, bytes_per_gpu: float, tp_size: int) -> float:
        """KV of one stream from the node's store, by all GPUs of a group at once: each one's link, and the host's memory for all."""
        return bytes_per_gpu / min(self.pcie_bytes_per_s, self.host_bytes_per_s / tp_size) * 1e3

    def copy_ms(self, bytes_per_gpu: float, from_tp: int, to_tp: int) -> float:
        """KV of B's GPUs, `bytes_per_gpu` on each. GPUs that flip together: as many as the wider of the two layouts."""
        low, high = sorted((from_tp, to_tp))
        if self.path is KvPath.PEER:
            return bytes_per_gpu * (1 - low / high) / self.nvlink_bytes_per_s * 1e3
        return self.load_ms(bytes_per_gpu, high)


@dataclass(frozen=True)
class FlipParts:
    fixed_ms: float
    kv_ms: float
    kv: KvFate

    @property
    def pause_ms(self) -> float:
        return self.fixed_ms + self.kv_ms
