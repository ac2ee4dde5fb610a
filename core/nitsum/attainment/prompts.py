"""What prompts cost."""

from dataclasses import dataclass

from nitsum.attainment.lengths import Points
from nitsum.perf import StepTimeModel

CHUNK = 8192
"""New tokens of a prefill step of stock SGLang."""


@dataclass(frozen=True)
class Prompts:
    """What prompts cost, in ms: `own` the time that one takes, `stall` that by which it delays the others' decode; mean squares."""

    each: Points
    own: float
    own2: float
    stall: float
    stall2: float

    @staticmethod
    def of(own: list[tuple[float, float]], stalls: list[tuple[float, float]], tail: float) -> "Prompts":
        """`tail`: by how much the mean squares are larger than those of the points."""
        moments = [sum(v**power * w for v, w in x) * (tail if power == 2 else 1.0) for x in (own, stalls) for power in (1, 2)]
        return Prompts(tuple(own), *moments)


def prefill(model: StepTimeModel, tp_size: int, tokens: float) -> float:
    """ms in steps that carry nothing else."""
    if tokens <= CHUNK:
        return model.prefill_ms(tp_size, max(int(tokens), 1))
    whole = int(tokens // CHUNK)
    took = sum(model.prefill_ms(tp_size, CHUNK, i * CHUNK) for i in range(whole))
    return took + (model.prefill_ms(tp_size, rest, whole * CHUNK) if (rest := int(tokens) - whole * CHUNK) > 0 else 0.0)
