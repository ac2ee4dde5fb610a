"""One request of a workload. `output` is what it will generate: engines count down to it, nobody else may look, but the oracle."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """`arrived` in seconds from the start; `max_new`: the limit that its client sets, which is known at arrival."""

    rid: int
    tier: str
    arrived: float
    prompt: int
    output: int
    max_new: int
