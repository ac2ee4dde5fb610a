"""The flip of one node from Layout A to Layout B, as a machine without clock or I/O. Only groups that differ are touched.

Idle -> Closing -> Ending -> Parking -> Waking -> Opening -> Done
and the way back, when B does not wake: Waking -> Reverting -> Rewaking -> Reopening -> Reverted, or Failed where A is dead too.

Every command ends in one event. At every instant at most one engine per GPU is not parked: checked after each step.
"""

from nitsum.flip.machine import Flip
from nitsum.flip.messages import (
    AbortStreams,
    CloseGroups,
    Command,
    DeadlinePassed,
    EngineEnded,
    EngineParked,
    EngineWoken,
    Event,
    FlipRequested,
    GroupsClosed,
    GroupsOpened,
    KillEngine,
    OpenGroups,
    ParkEngine,
    StreamsEnded,
    WakeEngine,
)
from nitsum.flip.states import ENDED, Deadlines, EngineState, FlipState

__all__ = [
    "ENDED",
    "AbortStreams",
    "CloseGroups",
    "Command",
    "DeadlinePassed",
    "Deadlines",
    "EngineEnded",
    "EngineParked",
    "EngineState",
    "EngineWoken",
    "Event",
    "Flip",
    "FlipRequested",
    "FlipState",
    "GroupsClosed",
    "GroupsOpened",
    "KillEngine",
    "OpenGroups",
    "ParkEngine",
    "StreamsEnded",
    "WakeEngine",
]
