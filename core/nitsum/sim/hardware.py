"""`--fleet`: NODESxGPUS:TYPE, several with commas between them, as nodes."""

import re

from nitsum.errors import InvalidSpec
from nitsum.topology import Gpu, Node

NODES_MAX, GPUS_MAX = 100_000, 64
_PART = re.compile(r"([0-9]+)x([0-9]+):([A-Za-z0-9_.-]+)")


def fleet(text: str, model: str, legal_tp: tuple[int, ...]) -> tuple[Node, ...]:
    """`1x8:h100_sxm` -> one node with eight GPUs in one island. Raises InvalidSpec."""
    nodes: list[Node] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise InvalidSpec("fleet", f"{part.strip()!r} is not NODESxGPUS:TYPE, like 1x8:h100_sxm")
        count, gpus, kind = int(match[1]), int(match[2]), match[3]
        if not 1 <= count <= NODES_MAX or not 1 <= gpus <= GPUS_MAX:
            raise InvalidSpec("fleet", f"{part.strip()!r}: nodes must be 1 to {NODES_MAX}, GPUs per node 1 to {GPUS_MAX}")
        for _ in range(count):
            i = len(nodes)
            nodes.append(Node(f"node-{i:05}", tuple(Gpu(j, f"node-{i:05}-{j}", kind) for j in range(gpus)), legal_tp={model: legal_tp}))
    return tuple(nodes)


def gpu_types(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip().rpartition(":")[2] for part in text.split(",")))
