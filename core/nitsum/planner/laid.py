"""Answers as they will serve: on real GPUs, with labels, and with what spills where a tier is short. By that the layout is chosen of
those that the search found, for what it counts on in shared groups does not always come."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from nitsum.planner.answer import Answer, holding, lack, more
from nitsum.planner.problem import Problem
from nitsum.planner.rating import rated, spilled
from nitsum.planner.serve import Serving

NEAR = 0.02
"""Of the best score: of layouts that earn less by no more than that, the one that leaves fewest tiers short is it."""


@dataclass(frozen=True)
class Laid:
    """`servings` of all pools that it is for; `loss`: score that the switch loses."""

    answer: Answer
    servings: tuple[Serving, ...]
    loss: float

    @cached_property
    def _real(self) -> tuple[tuple[Problem, Answer], ...]:
        return tuple((s.asked, spilled(s.asked, s.answer)) for s in self.servings)

    @cached_property
    def score(self) -> float:
        return sum(rated(asked, answer).score for asked, answer in self._real) - self.loss

    @cached_property
    def short(self) -> int:
        """Tiers that do not hold."""
        return sum(len(asked.wants) - len(holding(asked, answer)) for asked, answer in self._real)

    @cached_property
    def lack(self) -> float:
        return sum(lack(asked, answer) for asked, answer in self._real)

    def wins(self, stays: "Laid", gain_min: float) -> bool:
        """As `answer.wins`."""
        return more(self.score, stays.score, gain_min, stays.lack, self.lack)


def best(options: Iterable[Laid]) -> Laid | None:
    found = list(options)
    if not found:
        return None
    most = max(o.score for o in found)
    return max(found, key=lambda o: (o.score >= most - NEAR * abs(most), -o.short, o.score))
