"""What a flip and its engines go through, and how long each phase may take."""

from dataclasses import dataclass
from enum import StrEnum


class FlipState(StrEnum):
    IDLE = "Idle"
    CLOSING = "Closing"
    ENDING = "Ending"
    PARKING = "Parking"
    WAKING = "Waking"
    OPENING = "Opening"
    DONE = "Done"
    REVERTING = "Reverting"
    REWAKING = "Rewaking"
    REOPENING = "Reopening"
    REVERTED = "Reverted"
    FAILED = "Failed"


ENDED = frozenset({FlipState.DONE, FlipState.REVERTED, FlipState.FAILED})


class EngineState(StrEnum):
    PARKED = "Parked"
    WAKING = "Waking"
    AWAKE = "Awake"
    PARKING = "Parking"
    KILLING = "Killing"
    DEAD = "Dead"


AT_REST = (EngineState.PARKED, EngineState.DEAD)


@dataclass(frozen=True)
class Deadlines:
    """Longest durations of the phases, in seconds."""

    let_finish_s: float = 0.0
    end_s: float = 2.0
    park_s: float = 5.0
    wake_s: float = 10.0
