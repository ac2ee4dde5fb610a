"""Which split blocks are worth a place in the search: for each size the division that serves the demand with fewest GPUs, of one tier or of
all; none where mixed groups have room or take hardly more GPUs for the same, since a choice that gains little costs planning time and calm.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product

from nitsum.attainment import BUSY_MAX, Safe
from nitsum.layout import Role
from nitsum.perf import KvLoad, StepTimeModel
from nitsum.planner import handover
from nitsum.planner.capacity import Capacity, Mark
from nitsum.planner.problem import Kind
from nitsum.planner.sharing import Sharing, crowd_of, runs_of
from nitsum.planner.split import SIZES, Split, divisions
from nitsum.pool import Tier

GAIN = 1.1
"""Times fewer GPUs than mixed groups' that a block must need."""
LARGER = 1.05
"""Times fewer than those of the next smaller block."""
NO_TPOT_MS = 1e3
USED = 0.7
"""Of its GPUs that a pool's demand must need with mixed groups: where these have room, roles gain nothing that is asked for."""
ATTAINED = 0.9
"""Of what engines could do if prompts came when it suits them: blocks do not get nearer."""


@dataclass(frozen=True)
class Asked:
    """`tiers` strictest first, `rates` in requests/s, `resident` TPs; `gpus` of the largest node. `load`: what a hand-over costs; None: its
    prompt is prefilled again, which is no way to decode."""

    pool: str
    tiers: tuple[Tier, ...]
    marks: Mapping[str, Mark]
    rates: Mapping[str, float]
    resident: tuple[int, ...]
    budget: int
    gpus: int
    model: StepTimeModel
    load: KvLoad | None


def safe_in(role: Role, a: Asked, capacity: Capacity, tp_size: int, sharing: Sharing, crowd: int) -> tuple[Safe, ...]:
    """Of one group in this role, for each tier that shares it."""
    found = []
    for tier, goal, guest in sharing:
        m = a.marks[tier]
        load_ms = 0.0 if role is Role.PREFILL else a.load.load_ms(round(m.prompt), tp_size) if a.load is not None else None
        if load_ms is None:
            found.append(Safe(0.0, "KV is not kept", 0))
            continue
        invited = (a.marks[guest].prompt, a.marks[guest].prompt_spread) if guest and role is Role.PREFILL else None
        whose = f"{a.pool}/{tier}/{guest}/{role}"
        in_role = handover.goal_in(role, goal)
        safe = capacity.of(a.model, tp_size, whose, m, in_role, a.resident, invited, False, crowd, role, load_ms)
        most = handover.linked(load_ms)
        found.append(safe if safe.rate <= most else replace(safe, rate=most, binding="hand-over"))
    return tuple(found)


class _Offer:
    def __init__(self, a: Asked, capacity: Capacity) -> None:
        self.a, self.capacity = a, capacity
        self.whole = sum(a.rates[t.name] for t in a.tiers) or 1.0
        self._known: dict[tuple[Role, int, Sharing], tuple[Safe, ...]] = {}

    def _safe(self, role: Role, tp_size: int, sharing: Sharing) -> tuple[Safe, ...]:
        if (found := self._known.get(key := (role, tp_size, sharing))) is None:
            part = sum(self.a.rates[t] for t, _, _ in sharing) / self.whole
            groups = self.a.budget // (2 * tp_size)  # about half of the GPUs do either
            found = self._known[key] = safe_in(role, self.a, self.capacity, tp_size, sharing, crowd_of(groups, part))
        return found

    def kind(self, split: Split, sharing: Sharing) -> Kind:
        prefill, decode = self._safe(Role.PREFILL, split.prefill_tp, sharing), self._safe(Role.DECODE, split.decode_tp, sharing)
        sides = [(split.prefill * p.rate, split.decode * d.rate, p.binding, d.binding) for p, d in zip(prefill, decode, strict=True)]
        rates = tuple(min(p, d) for p, d, _, _ in sides)
        binding = tuple(f"{of} of prefill" if p <= d else f"{at} of decode" for p, d, of, at in sides)
        batches = tuple(split.decode * d.batch for d in decode)
        names = tuple(t for t, _, _ in sharing)
        attained = tuple(  # TTFT on one side, TPOT on the other
            (p.attained[0] * d.attained[0], p.attained[1] * d.attained[1]) for p, d in zip(prefill, decode, strict=True)
        )
        return Kind(self.a.pool, split.gpus, names, rates, binding, batches, split=split, attained=attained)

    def needs(self, kind: Kind) -> float:
        """GPUs for the demand of its tiers."""
        return sum(self.a.rates[t] / rate if rate > 0 else math.inf for t, rate in zip(kind.tiers, kind.rates, strict=True)) * kind.tp_size

    def least(self, tier: Tier) -> float:
        """GPUs below which no block gets for a tier, whatever it is divided into."""
        a, m = self.a, self.a.marks[tier.name]
        ctx = int(m.prompt + m.output / 2)
        step = max(int(m.prompt), handover.MANY)  # short prompts share one
        prefills = [tp * a.model.prefill_ms(tp, step) * m.prompt / step / BUSY_MAX for tp in a.resident]
        decodes = []
        for tp in a.resident:
            most, _ = self.capacity.decode_size(a.model, tp, m.prompt, m.output, tier.tpot_ms or NO_TPOT_MS, a.resident)
            decodes.append(tp * m.output * a.model.decode_ms(tp, most, ctx) / most)
        return a.rates[tier.name] * (min(prefills) + min(decodes)) / 1e3 / ATTAINED


def kinds(a: Asked, capacity: Capacity, whole: tuple[Kind, ...] | None, running: Collection[Split]) -> tuple[Kind, ...]:
    """Of blocks that run, and of those that are worth it beside these kinds of `whole` groups; None: no others."""
    runs = [sharing for sharing in runs_of(a.tiers) if len(sharing) in (1, len(a.tiers))]
    offer, found = _Offer(a, capacity), list[Kind]()
    for split, sharing in product(sorted(running), runs):
        kind = offer.kind(split, sharing)
        if len(sharing) == 1 or all(kind.rates):
            found.append(kind)
    if whole is None:
        return tuple(found)
    mixed = {t.name: _mixed(a, whole, t.name) for t in a.tiers}
    if sum(mixed.values()) < USED * a.budget:
        return tuple(found)
    named = {t.name: t for t in a.tiers}
    for sharing in runs:
        most = sum(mixed[t] for t, _, _ in sharing) / GAIN
        if sum(offer.least(named[t]) for t, _, _ in sharing) > most:
            continue
        for size in SIZES:
            if size > min(a.gpus, a.budget):
                break
            best = min((offer.kind(split, sharing) for split in divisions(size, a.resident)), key=offer.needs, default=None)
            if best is None or (needs := offer.needs(best)) > most or math.isinf(needs):
                continue
            most = needs / LARGER
            if best.split not in running:
                found.append(best)
    return tuple(found)


def _mixed(a: Asked, whole: tuple[Kind, ...], tier: str) -> float:
    """GPUs of the mixed groups that serve all demand of a tier with fewest."""
    return min((a.rates[tier] / rate * k.tp_size for k in whole if (rate := k.rate(tier)) > 0), default=math.inf)
