"""Residency: which engines are kept warm on a node, awake or parked.

Changing it is a cold operation; flips go between resident engines only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ResidentEngine:
    """A model at one TP degree on these GPUs, in rank order."""

    engine_id: str
    model: str
    tp_size: int
    gpu_uuids: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.gpu_uuids) == self.tp_size, f"{self.engine_id}: TP {self.tp_size} on {len(self.gpu_uuids)} GPUs"


@dataclass(frozen=True)
class Residency:
    engines: tuple[ResidentEngine, ...] = ()

    def __post_init__(self) -> None:
        assert len({e.engine_id for e in self.engines}) == len(self.engines), "engine ids repeat"

    def engine(self, engine_id: str) -> ResidentEngine | None:
        return next((e for e in self.engines if e.engine_id == engine_id), None)
