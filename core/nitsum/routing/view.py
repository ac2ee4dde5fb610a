"""A group as a router knows it, the class in which it admits a request, and what it may hold of a prompt."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from nitsum.layout import Role

Key = tuple[str, str]


class AdmissionClass(StrEnum):
    FEASIBLE = "Feasible"
    BEST_EFFORT = "BestEffort"
    BACKGROUND = "Background"


@dataclass(frozen=True)
class GroupView:
    """A group as the gateway last heard of it. `key` is unique in the fleet: (agent id, group id)."""

    key: tuple[str, str]
    epoch: int
    serving: bool
    """Open, or opening: it takes submissions."""
    tiers: frozenset[str]
    """Tiers it is meant for; empty: all."""
    running: int = 0
    queued: int = 0
    capacity: int = 0
    """Requests it can run within SLO; 0: not limited."""
    hint: bool = False
    """Its node does not list it as serving (any more): worth asking only for where it went."""
    role: Role = Role.MIXED
    """Streams that have a token go where decoding is done, elsewhere if that is full. New requests go where prompts are prefilled, full or
    not: a prompt in a group that decodes alone would stall all streams of its steps."""

    @property
    def load(self) -> float:
        busy = self.running + self.queued
        return busy / self.capacity if self.capacity else float(busy)

    @property
    def feasible(self) -> bool:
        return not self.capacity or self.running + self.queued < self.capacity


class Warm(NamedTuple):
    """A group that ran the first `share` (0 to 1) of a prompt's tokens: it may have their KV while its epoch lasts, its node longer."""

    key: Key
    epoch: int
    share: float
