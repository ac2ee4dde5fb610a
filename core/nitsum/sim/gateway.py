"""A simulated gateway: its own view of the groups, up to a second old, and its own windows of demand, as the real one reports them."""

from collections import Counter
from dataclasses import dataclass, field

from nitsum.demand_estimate import Window
from nitsum.length_sketch import Sketch
from nitsum.routing import Routes
from nitsum.sim.group import SimGroup


@dataclass
class _Tier:
    arrivals: int = 0
    prompt: Sketch = field(default_factory=Sketch)
    output: Sketch = field(default_factory=Sketch)


class Gateway:
    def __init__(self, name: str, pool: str, tiers: tuple[str, ...]) -> None:
        self.name, self.pool, self.tiers = name, pool, tiers
        self.routes = Routes()
        self.stale: set[SimGroup] = set()
        """Groups with news since the last look."""
        self.turn = 0
        """Of the round robin that `plain` does."""
        self._seen = {t: _Tier() for t in tiers}
        self.in_flight: Counter[str] = Counter()
        self._running: dict[str, Sketch] = {}

    def refresh(self) -> None:
        for g in sorted(self.stale, key=lambda g: (not g.closing, g.key)):  # a key's next group comes after the one that ended
            if g.closing:
                self.routes.remove(g.key)
            else:
                self.routes.put(g.view())
        self.stale.clear()

    def arrived(self, tier: str, prompt: int) -> None:
        t = self._seen[tier]
        t.arrivals += 1
        t.prompt.add(prompt)
        self.in_flight[tier] += 1

    def ended(self, tier: str, output: int | None) -> None:
        """`output` None: it was refused or failed."""
        if output is not None:
            self._seen[tier].output.add(output)
        self.in_flight[tier] -= 1

    def runs(self, tier: str, tokens: int, weight: int) -> None:
        """A stream that has come to so many tokens when the window ends; it stands for `weight` of them."""
        self._running.setdefault(tier, Sketch()).add(tokens, weight)

    def windows(self, now: float, seconds: float) -> list[Window]:
        """Ends the window."""
        found = [
            Window(
                self.pool,
                tier,
                now,
                seconds,
                t.arrivals,
                float(t.arrivals**2),
                self.in_flight[tier],
                (t.prompt.buckets, 0, t.prompt.total),
                (t.output.buckets, 0, t.output.total),
                self._running.get(tier, Sketch()).buckets,
                self.name,
            )
            for tier, t in self._seen.items()
        ]
        self._seen, self._running = {t: _Tier() for t in self.tiers}, {}
        return found
