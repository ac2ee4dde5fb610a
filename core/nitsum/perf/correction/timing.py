"""What an engine tells of a step that it ran."""

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True)
class StepTiming:
    """One step as an engine measured it, or the mean of several alike. Prefill has no batch, decode no chunk.

    `ctx`: mean context of the decodes; of a pure prefill, the tokens cached before its chunk.
    """

    tp_size: int
    chunk: int
    batch: int
    ctx: int
    ms: float

    @property
    def phase(self) -> Phase:
        return Phase.MIXED if self.chunk and self.batch else Phase.PREFILL if self.chunk else Phase.DECODE
