"""Shares and limits of a group: what its node admits, so that overload is shed at once and what runs keeps its targets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nitsum.attainment import Lengths, running_length
from nitsum.demand import TierDemand
from nitsum.governor import CHUNK_MAX
from nitsum.layout import Capacity as Limits
from nitsum.layout import Role, TierShare
from nitsum.objective import mixture, strictest
from nitsum.perf import KvLoad, StepTimeModel
from nitsum.planner import handover
from nitsum.planner.capacity import PRIOR_OUTPUT, PRIOR_PROMPT, Capacity
from nitsum.planner.place import Placed
from nitsum.planner.question import PoolQuestion
from nitsum.planner.serve import Serving
from nitsum.planner.split import Split, shape_of
from nitsum.planner.types import Snapshot

QUEUE_PER_RUNNING = 4
"""Waiting requests that a group may hold for each running one."""
SLOW_RPS, QUEUE_SLOW = 1.0, 16
SHELTERED, SHARE_MIN = 1e-3, 2e-3
"""Of a tier that a group serves: routers take a share of 0 for a tier that rides along."""
MIXED_MIN = 0.1
"""Of a tier's use of its groups: routers do not know flows, so some of each tier that a group serves comes to it."""
PATIENCE = 0.45
"""Of the TTFT that may pass in a queue: the request's own prefill comes after it."""
FILLED = 0.8
"""Part of a group's time that background may fill up: its prompts go in turn with the others'."""
KEPT = 0.99
"""Of what a hand-over leaves of a TPOT, for the mean of steps."""
NO_TPOT_MS = 200.0
"""Of a step, where no tier says how long it may last."""
ROOM = 1.5
"""Running requests over those at the safe rate, where no TPOT limits them: groups that share arrivals take more than one alone."""


def limits_of(q: PoolQuestion, serving: Serving, p: Placed, snapshot: Snapshot, capacity: Capacity) -> tuple[tuple[TierShare, ...], Limits]:
    """Of each group of this kind: shares by flow; limits by the mixture of its tiers and their tightest targets, and by its role."""
    covered, tiers, tp_size = serving.covered, p.tiers, len(p.gpus)
    # A tier that no group can hold the targets of, or that no group is left for, rides along everywhere. Background goes where the loosest
    # tier does, on what that leaves.
    along = [t.name for t in q.slo_tiers if t.name not in covered]
    loosest = not q.slo_tiers or not tiers or q.slo_tiers[-1].name in tiers or q.slo_tiers[-1].name not in covered
    if p.split is not None and any(other.split is None for other in serving.placed):
        loosest = False  # what it takes in of background would wait in front of decode, with those behind it
    model = snapshot.step_times[q.pool.name]
    kv_tokens = capacity.kv_tokens(model, tp_size, q.tps)
    known = tuple(t for t in tiers if t not in serving.sheltered) or tiers  # who is only taken in has no say in the limits
    k = serving.kind(shape_of(tp_size, None) if p.split is None else shape_of(p.split.gpus, p.split), known)
    kind = serving.asked.kinds[k] if k is not None else None
    flows = {t: serving.answer.flows.get((k, t), 0.0) for t in known} if k is not None else {}
    own = [t.name for t in q.slo_tiers if t.name in known and t.name not in serving.sheltered]
    total = sum(flows[t] for t in own)
    shares = tuple(TierShare(t, max(round(flows[t] / total, 3), SHARE_MIN) if total > 0 else round(1 / len(own), 3)) for t in own)
    spare = max(FILLED - (serving.used(k) if k is not None else 1.0), 0.0)
    tpot_ms = min((t.tpot_ms for t in q.slo_tiers if t.name in own and t.tpot_ms is not None), default=None)

    def beside(tier: str, part: float) -> int:
        """As many requests of a tier as fit into a part of the group's time."""
        if p.role is not Role.MIXED:
            return 1
        of = q.demand[tier].prompt_tokens_mean or PRIOR_PROMPT, q.demand[tier].output_tokens_mean or PRIOR_OUTPUT
        return max(round(part * capacity.size(model, tp_size, *of, tpot_ms or NO_TPOT_MS, q.tps)[0]), 1)

    shares += tuple(TierShare(t, SHELTERED, beside(t, spare)) for t in tiers if t in serving.sheltered)
    shares += tuple(TierShare(t, 0.0) for t in dict.fromkeys(along))
    if kind is None or k is None or not kind.rates:
        return (*shares, *(TierShare(t, 0.0) for t in q.background)), Limits(0, kv_tokens, 0.0, 0)
    if p.split is not None and p.role is not Role.MIXED:
        shares += tuple(TierShare(t, SHELTERED, 1) for t in q.background if loosest)
        return shares, _in_role(q, p.role, p.split, [t for t in own if kind.rate(t) > 0] or own[-1:], flows, snapshot, capacity)
    able = [(t, rate, batch) for t, rate, batch in zip(kind.tiers, kind.rates, kind.batches, strict=True) if rate > 0 and t in own]
    if not able:  # it cannot hold their targets: one at a time is the best it can do
        return (*shares, *(TierShare(t, SHELTERED, 1) for t in q.background if loosest)), Limits(1, kv_tokens, 0.0, queue(0.0, None, 1))
    busy = sum(flows.get(t, 0.0) / rate for t, rate, _ in able) or 1.0
    uses = {t: max(flows.get(t, 0.0) / rate / busy, MIXED_MIN) for t, rate, _ in able}
    uses = {t: u / sum(uses.values()) for t, u in uses.items()}
    rates = {t: uses[t] * rate for t, rate, _ in able}
    rate = sum(rates.values())
    prompt = sum(r * (q.demand[t].prompt_tokens_mean or PRIOR_PROMPT) for t, r in rates.items()) / rate
    output = sum(r * (q.demand[t].output_tokens_mean or PRIOR_OUTPUT) for t, r in rates.items()) / rate
    running = max(round(ROOM * sum(uses[t] * batch for t, _, batch in able)), 1)
    chunk, prefill = 0, round(rate * prompt, 1)
    if tpot_ms is not None:
        running, chunk = capacity.size(model, tp_size, prompt, output, tpot_ms, q.tps, _running_length(q.demand, rates))
    if loosest:
        shares += tuple(TierShare(t, SHELTERED, beside(t, spare / max(len(q.background), 1))) for t in q.background)
    ttft_ms = min((t.ttft_ms for t in q.slo_tiers if t.name in own and t.ttft_ms is not None), default=None)
    return shares, Limits(running, kv_tokens, prefill, queue(rate, ttft_ms, running), chunk)


def _running_length(demand: Mapping[str, TierDemand], rates: Mapping[str, float]) -> float:
    """Of the streams of all these tiers."""
    seen = made = 0.0
    for t, rate in rates.items():
        prompt, output = demand[t].prompt_tokens_mean or PRIOR_PROMPT, demand[t].output_tokens_mean or PRIOR_OUTPUT
        seen += rate * output
        made += rate * output * running_length(prompt, Lengths(output, demand[t].output_tokens_cv))
    return made / seen


def _in_role(
    q: PoolQuestion, role: Role, split: Split, tiers: list[str], flows: dict[str, float], snapshot: Snapshot, capacity: Capacity
) -> Limits:
    """By the targets and lengths of these tiers: those that the block can hold, or the loosest that it is for."""
    members = [t for t in q.slo_tiers if t.name in tiers]
    load = mixture(tuple(replace(q.demand[t], rate=flows.get(t) or q.demand[t].rate) for t in tiers))
    targets = strictest(tuple(members))
    cost, model = snapshot.flip_costs[q.pool.name], snapshot.step_times[q.pool.name]
    block = Block(capacity, model, split, q.tps, load.prompt, load.output, targets.ttft_ms, targets.tpot_ms, cost)
    return block.prefill() if role is Role.PREFILL else block.decode()


@dataclass(frozen=True)
class Block:
    """A split block under requests of these mean lengths. `load`: what tells how long KV takes to come, if it is a KvLoad."""

    capacity: Capacity
    model: StepTimeModel
    split: Split
    resident: tuple[int, ...]
    prompt: float
    output: float
    ttft_ms: float | None
    tpot_ms: float | None
    load: object

    def prefill(self) -> Limits:
        """Of each group that prefills. All that it has waits, so no more than starts within the TTFT at the pace of the slower side."""
        tp_size, prompt = self.split.prefill_tp, max(int(self.prompt), 1)
        running, step_ms = self._size()
        rate = (
            min(1 / self.model.prefill_ms(tp_size, prompt), self.split.decode * running / (self.output * step_ms) / self.split.prefill)
            * 1e3
        )
        ahead = max(math.ceil(CHUNK_MAX / prompt), 2)
        waiting = queue(rate, self.ttft_ms, ahead) if self.ttft_ms is not None else 0
        queued = max(waiting - ahead, 1) if waiting else queue(0.0, None, ahead)
        return Limits(ahead, self.capacity.kv_tokens(self.model, tp_size, self.resident), round(rate * self.prompt, 1), queued)

    def decode(self) -> Limits:
        """Of each group that decodes."""
        tp_size = self.split.decode_tp
        running, step_ms = self._size()
        _, chunk = self.capacity.decode_size(self.model, tp_size, self.prompt, self.output, step_ms, self.resident)
        return Limits(running, self.capacity.kv_tokens(self.model, tp_size, self.resident), 0.0, queue(0.0, None, running), chunk)

    def _size(self) -> tuple[int, float]:
        """(streams that may decode in one group, how long a step of theirs may be, after what a hand-over takes of their TPOT)."""
        tp_size, step = self.split.decode_tp, self.tpot_ms or NO_TPOT_MS
        load_ms = (self.load.load_ms(round(self.prompt), tp_size) if isinstance(self.load, KvLoad) else None) or 0.0
        late = handover.late_ms(self.model, tp_size, self.prompt, load_ms) / max(self.output, 1.0)
        step = round(KEPT * max(step - late, step / 2), 2)
        return self.capacity.decode_size(self.model, tp_size, self.prompt, self.output, step, self.resident)[0], step


def queue(rate: float, ttft_ms: float | None, running: int) -> int:
    """As many as are started within the tightest TTFT: who waits longer misses it, and makes all behind him miss it too.

    Slow groups keep a few all the same, as many as they start in QUEUE_SLOW / SLOW_RPS seconds or fewer: that is no overload yet.
    """
    by_running = running * QUEUE_PER_RUNNING + 8
    if ttft_ms is None or not rate:
        return by_running
    few = min(round(QUEUE_SLOW * SLOW_RPS / max(rate, SLOW_RPS)), by_running)
    return max(round(PATIENCE * rate * ttft_ms / 1e3), few, 1)
