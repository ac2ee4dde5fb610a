"""The slow plane's question in numbers, and the one objective by which its answers are compared (`answer.value`).

Identical nodes aggregate: what is decided is how many groups of each Kind run on nodes of each Class, and how much of each tier's rate
flows through each kind. A kind's `rates[t]` is what one group could serve of tier t alone with every target of the kind held, so a mix
holds while sum_t flow[t] / rates[t] <= groups.

Score, per tier: weight x sum over PIECES of worth x rate in the piece - what the switch loses. The first piece ends at the tier's target
share, which comes before more goodput; what lies beyond the demand is capacity for a surge and only breaks ties.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nitsum.planner.split import Shape, Split, shape_of, widest_of

SURGES = ((1.1, 2.0), (2.0, 1e-2), (4.0, 3e-3), (1e4, 1e-4))
"""(multiple of the demand up to which the piece goes, worth of a request/s in it). The first: at its safe rate a group holds the share that
is asked for, with a little slack nearly all."""
REACH, REST = 11.0, 1.0
"""Worth of a request/s up to the target, and from there up to what surely comes."""
INSURED = 3.0
"""From there up to the demand with headroom: it comes with less than half the probability, or is served at some cost to safety."""
KEEP = 1e-3
"""Cost of a group that did not run before, relative to a tier's score: between equals, what runs stays."""


@dataclass(frozen=True)
class Want:
    """Demand of one tier: requests/s with headroom, the share that must be met, its weight; `sure`: what comes for sure, 0: all of it."""

    pool: str
    tier: str
    rate: float
    target: float
    weight: float
    surge_max: float = 1e4
    """Multiple of the rate beyond which more capacity is worth nothing."""
    sure: float = 0.0

    @cached_property
    def least(self) -> float:
        """requests/s; what of it is not served counts as lacking (`lack`)."""
        return min(self.sure or self.rate, self.rate)

    def earned(self, served: float) -> float:
        """Worth of what is served, capacity for surges left out."""
        worth = 0.0
        for width, each in sorted(self._natural[:DEMAND], key=lambda piece: -piece[1]):
            got = min(served, width)
            worth, served = worth + got * each, served - got
        return worth

    def pieces(self) -> tuple[tuple[float, float], ...]:
        """(width in requests/s, worth of one, weight included); worth falls from piece to piece, so filling them in order is optimal."""
        return self._pieces

    @cached_property
    def _pieces(self) -> tuple[tuple[float, float], ...]:
        return tuple(sorted(self._natural, key=lambda piece: -piece[1]))

    @cached_property
    def _natural(self) -> tuple[tuple[float, float], ...]:
        surges = ((self.rate * min(end, self.surge_max), worth) for end, worth in SURGES)
        ends = ((self.target * self.least, REACH), (self.least, REST), (self.rate, INSURED), *surges)
        starts = (0.0, *(end for end, _ in ends))
        return tuple((end - start, self.weight * worth) for (end, worth), start in zip(ends, starts, strict=False))


RATE_MIN = 1e-3
"""requests/s of a group below which it counts as unable."""
DEMAND = 3
PIECES = DEMAND + len(SURGES)
"""Of a tier's demand, and with what lies beyond."""


@dataclass(frozen=True)
class Kind:
    """Groups of one sort, or split blocks of one. `tiers` strictest first; `rates` requests/s, 0 where even one request breaks a target;
    `binding` what limits."""

    pool: str
    tp_size: int
    """Of a split block: its GPUs."""
    tiers: tuple[str, ...]
    rates: tuple[float, ...]
    binding: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    """Requests that may run at once, if of one tier alone."""
    held: float | None = None
    """Not None: of one tier whose targets a group can hold at this rate only; `rates` is what some of its requests would meet beyond it."""
    split: Split | None = None
    attained: tuple[tuple[float, float], ...] = ()
    """By tier: shares met at half of the rate, and at the rate. Empty: not known."""

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.tp_size, self.split)

    @property
    def full(self) -> bool:
        return self.held is None or self.held > 0

    @cached_property
    def by_tier(self) -> Mapping[str, float]:
        """Rates, less those too small for a solver's arithmetic; kept, as they are asked for many times in each plan."""
        return {t: rate if rate >= RATE_MIN else 0.0 for t, rate in zip(self.tiers, self.rates, strict=False)}

    @cached_property
    def members(self) -> frozenset[str]:
        return frozenset(self.tiers)

    def rate(self, tier: str) -> float:
        return self.by_tier.get(tier, 0.0)

    @property
    def label(self) -> str:
        return f"{self.where} for {'+'.join(self.tiers)}"

    @property
    def where(self) -> str:
        return f"TP{self.tp_size}" if self.split is None else f"({self.split})"


@dataclass(frozen=True)
class Class:
    """Equal nodes: how many, GPUs of each, pools whose selector they match."""

    nodes: int
    gpus: int
    pools: frozenset[str]
    blocks: Mapping[int, int] = field(default_factory=dict)
    """By GPUs: aligned blocks of one node (islands hold a group together)."""
    only: Shape | None = None
    """Not None: its GPUs are such groups already."""

    def takes(self, kind: Kind) -> bool:
        return kind.pool in self.pools and self.blocks.get(kind.tp_size, 0) > 0 and self.only in (None, kind.shape)


Counts = dict[tuple[int, int], int]
"""Groups by (class index, kind index); zeros are left out."""


@dataclass(frozen=True)
class Problem:
    wants: tuple[Want, ...]
    kinds: tuple[Kind, ...]
    classes: tuple[Class, ...]
    budgets: Mapping[str, int]
    """GPUs by pool, less those that lost nodes may hold."""
    runs: Mapping[tuple[int, str, Shape], int] = field(default_factory=dict)
    """Groups that run now by (class index, pool, shape)."""
    flip_loss: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """By pool and TP: score lost per GPU that changes to it, or its role: pause x what a GPU earns / expected dwell."""

    def legal(self, counts: Counts) -> bool:
        """Budgets, nodes and blocks."""
        used: dict[str, int] = {}
        by_class: dict[int, int] = {}
        for (c, k), n in counts.items():
            kind, cls = self.kinds[k], self.classes[c]
            if not cls.takes(kind) or n < 0:
                return False
            used[kind.pool] = used.get(kind.pool, 0) + n * kind.tp_size
            by_class[c] = by_class.get(c, 0) + n * kind.tp_size
        blocks: dict[tuple[int, int], int] = {}
        for (c, k), n in counts.items():
            blocks[c, self.kinds[k].tp_size] = blocks.get((c, self.kinds[k].tp_size), 0) + n
        return (
            all(n <= self.budgets.get(p, 0) for p, n in used.items())
            and all(n <= self.classes[c].nodes * self.classes[c].gpus for c, n in by_class.items())
            and all(n <= self.classes[c].nodes * self.classes[c].blocks.get(tp, 0) for (c, tp), n in blocks.items())
        )

    def new_loss(self, pool: str, shape: Shape) -> float:
        """Of one group, or split block, that did not run before."""
        return shape[0] * self.flip_loss.get((pool, widest_of(shape)), 0.0) + KEEP

    def widths(self, counts: Counts) -> dict[tuple[int, str, Shape], int]:
        """Groups by class, pool and shape, whatever tiers they serve."""
        found: dict[tuple[int, str, Shape], int] = {}
        for (c, k), n in counts.items():
            if n:
                key = c, self.kinds[k].pool, self.kinds[k].shape
                found[key] = found.get(key, 0) + n
        return found

    def switch_loss(self, counts: Counts) -> float:
        """Of groups that are new on their class: GPUs x flip_loss, and KEEP for each."""
        if not self.runs:
            return 0.0
        return sum(max(n - self.runs.get(key, 0), 0) * self.new_loss(key[1], key[2]) for key, n in self.widths(counts).items())
