"""What a run yields: one outcome per request, and what stood where."""

from dataclasses import dataclass
from enum import StrEnum


class Ending(StrEnum):
    FINISHED = "Finished"
    REFUSED = "Refused"
    """Shed with 429."""
    FAILED = "Failed"
    """Cut off, given up, or not ended when the run did."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`ttft_ms` None: no token came. `tpot_ms` None: no second one."""

    tier: str
    arrived: float
    ending: Ending
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True)
class LayoutAt:
    """From `at` on: GPUs by (TP, tiers); those of a flip that is under way count under TP 0."""

    at: float
    gpus: tuple[tuple[int, tuple[str, ...], int], ...]


@dataclass(frozen=True)
class RunResult:
    policy: str
    duration_s: float
    outcomes: tuple[Outcome, ...]
    layouts: tuple[LayoutAt, ...]
    flips: int
    gpus_max: int
    retractions: int
    ended_at: float
    note: str = ""
