"""The one event queue of a run."""

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        """A heap; those of one moment in the order in which they were put in."""
        self._serial = count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self._serial), what))
