"""How the streams of groups that end are treated: aborted, and computed again where they go on, or left to end where they run for a while.

While a closed group drains, nothing new comes in and e^(-s / life) of its streams are left after s: what it does not do meanwhile is lost,
and so is what is computed again of those left. A wait of w loses w - life (1 - e^(-w / life)) + again e^(-w / life), which is least
at w = life ln(1 + again / life). Few tokens, or long streams: abort. Much KV of streams that soon end: wait.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nitsum.attainment import Lengths, running_length
from nitsum.demand import TierDemand
from nitsum.layout import FlipMode, Group
from nitsum.perf import FlipCost
from nitsum.planner.capacity import PRIOR_OUTPUT
from nitsum.pool import Tier

WORTH_MS = 500.0
"""What waiting must save: how long streams live is an estimate."""
WAIT_MAX_S = 20.0
NO_TPOT_MS = 25.0
"""Of a step, where a tier has no target."""


def life_s(tier: Tier, demand: TierDemand) -> float:
    """How much longer a stream that runs is expected to run, at the pace that its tier allows: as long as it has run on average."""
    tokens = running_length(0.0, Lengths(demand.output_tokens_mean or PRIOR_OUTPUT, demand.output_tokens_cv))
    return tokens * (tier.tpot_ms or NO_TPOT_MS) / 1e3


def mean_life_s(tiers: Iterable[Tier], demand: Mapping[str, TierDemand]) -> float:
    """Of streams of several tiers, by how many there are of each."""
    known = [(demand[t.name].rate * life_s(t, demand[t.name]), life_s(t, demand[t.name])) for t in tiers if t.name in demand]
    running = sum(many for many, _ in known)
    return sum(many * life for many, life in known) / running if running > 0 else 0.0


@dataclass(frozen=True)
class Ending:
    """`lost_ms`: in which the group's GPUs yield nothing, all told."""

    mode: FlipMode
    lost_ms: float
    let_finish_s: float = 0.0


def ending(tokens: int, from_tp: int, to_tp: int, life: float, cost: FlipCost) -> Ending:
    """Of one group with so much KV, whose streams live for `life` seconds more in the mean. `lost_ms` as `FlipCost.pause_ms`."""
    aborted = cost.pause_ms(tokens, FlipMode.ABORT, from_tp, to_tp)
    fixed = cost.pause_ms(tokens, FlipMode.LET_FINISH, from_tp, to_tp)
    again = (aborted - fixed) / 1e3
    if life > 0 and again > 0:
        wait = min(life * math.log1p(again / life), WAIT_MAX_S)
        left = math.exp(-wait / life)
        lost = fixed + (wait - life * (1 - left) + again * left) * 1e3
        if aborted - lost >= WORTH_MS:
            return Ending(FlipMode.LET_FINISH, lost, wait)
    return Ending(FlipMode.ABORT, aborted)


@dataclass(frozen=True)
class Ends:
    """A group that ends: its KV in tokens, how long its streams live, what a flip of it costs, and to which TPs."""

    group: Group
    tokens: int
    life_s: float
    cost: FlipCost
    tps: tuple[int, ...]


def of_node(ends: Iterable[Ends], comes: Iterable[Group]) -> Ending:
    """One mode for all groups of a node that end: that of the one which loses most. Where nothing of its pool follows on its GPUs, its
    streams go to other groups, as wide as itself or the narrowest."""
    new = list(comes)
    found = []
    for e in ends:
        g = e.group
        after = [n.tp_size for n in new if n.pool == g.pool and n.tp_size in e.tps and not set(n.gpu_uuids).isdisjoint(g.gpu_uuids)]
        to_tp = max(after, default=g.tp_size if g.tp_size in e.tps else min(e.tps, default=0))
        if to_tp:
            found.append(ending(e.tokens, g.tp_size, to_tp, e.life_s, e.cost))
    return max(found, key=lambda e: (e.lost_ms, e.let_finish_s), default=Ending(FlipMode.ABORT, 0.0))
