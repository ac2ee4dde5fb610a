"""One engine at a rate: what prompts and decode take, where they settle, what of a goal is met."""

import copy
import math
from dataclasses import dataclass, field
from statistics import NormalDist

from nitsum.attainment import steady
from nitsum.attainment.goal import Goal, Point
from nitsum.attainment.lengths import Lengths, Points, running_length
from nitsum.attainment.met import full, tpot_share, ttft_share
from nitsum.attainment.prompts import CHUNK, Prompts, prefill
from nitsum.attainment.steady import Steady
from nitsum.governor import depth, largest, sizes, step_ms
from nitsum.perf import StepTimeModel, door_ms

LIVES = 0.75
"""Variance of the batch as one request sees it over its life, relative to the variance at an instant."""
EVEN = 0.5
"""Least dispersion that one group of several can count on, however evenly routers spread what comes: their views are a second old."""
BUSY_MAX, MIXED_BUSY_MAX = 0.85, 0.92
"""Share of the time that prefill may take: above it a little more load makes a long queue."""


@dataclass
class Group:
    """One engine as its step times tell. Keeps what does not depend on the rate."""

    model: StepTimeModel
    tp_size: int
    prompt: Lengths
    output: Lengths
    dispersion: float = 1.0
    """Variance of counts over their mean, 1: Poisson; of all that comes to the groups that share it."""
    governed: bool = False
    guest: Lengths | None = None
    """Prompts of a stricter tier in the same group, which wait behind these."""
    resident_tp: tuple[int, ...] = ()
    crowd: int = 1
    """Groups alike among which routers spread what comes, the least loaded first: each sees less of bursts and of long prompts."""
    late: float = 0.0
    """ms from a request's first token, made elsewhere, to its first step here."""
    _decode: dict[int, float] = field(default_factory=dict)
    _sizes: dict[float, tuple[int, int]] = field(default_factory=dict)
    _fits: dict[float, int] = field(default_factory=dict)
    _later: dict[float, tuple[float, ...]] = field(default_factory=dict)
    _settled: dict[tuple[float, float, float | None], Steady] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = self.output.points()
        kv = self.kv_tokens = self.model.kv_capacity_tokens(self.tp_size, self.resident_tp)
        room = kv - self.outputs[-1][0]
        self.kv_fits = room > self.prompt.mean
        # A drawn tail ends nowhere; what does not fit is refused where it comes in, and does not run.
        self.prompts = tuple((min(tokens, max(room, 1.0)), w) for tokens, w in self.prompt.points())
        self.lives = tuple((max(tokens - 1, 1.0), w) for tokens, w in self.outputs)
        """(decode steps of a request, share of requests)."""
        mean = self.prompt.mean
        self.door = door_ms(self.model, self.tp_size)
        self.ctx = max(int(running_length(mean, self.output)), 1)
        one, two = prefill(self.model, self.tp_size, mean), prefill(self.model, self.tp_size, 2 * mean)
        self.fixed = max(one - (two - one), 0.0) if 2 * mean <= CHUNK else 0.0
        """Of a prefill step, whatever it carries."""
        own = [(prefill(self.model, self.tp_size, p), w) for p, w in self.prompts]
        self.stock = Prompts.of(own, [(max(s - self.fixed, 1e-6), w) for s, w in own], self.prompt.tail)
        self._tokens = sum(p * w for p, w in self.prompts)
        self._invite(self.guest)
        self.kv_batch = kv / max(running_length(mean, self.output), mean + self.output.mean, 1.0)

    def _invite(self, guest: Lengths | None) -> None:
        self.guest, self.guests = guest, guest.points() if guest else ()
        self.stock_guests = tuple((prefill(self.model, self.tp_size, p), w) for p, w in self.guests)

    def among(self, crowd: int, dispersion: float, guest: Lengths | None) -> "Group":
        """The same engine and lengths under other bursts and guests: what was worked out for one serves the other."""
        other = copy.copy(self)
        other.crowd, other.dispersion = crowd, dispersion
        other._invite(guest)
        return other

    def decode(self, batch: float) -> float:
        """Linear between whole batches."""
        low, known = int(batch) if batch > 1 else 1, self._decode
        if (first := known.get(low)) is None:
            first = known[low] = self.model.decode_ms(self.tp_size, low, self.ctx)
        if batch <= low:
            return first
        if (second := known.get(low + 1)) is None:
            second = known[low + 1] = self.model.decode_ms(self.tp_size, low + 1, self.ctx)
        return first + (batch - low) * (second - first)

    def chunk(self, tpot_ms: float) -> int:
        """Prefill tokens of a step beside decode, as plans give them to the governor."""
        return self._sized(tpot_ms)[1]

    def _sized(self, tpot_ms: float) -> tuple[int, int]:
        """(as many as may run, tokens of prefill beside them)."""
        if tpot_ms not in self._sizes:
            self._sizes[tpot_ms] = sizes(self.model, self.tp_size, self.prompt.mean, self.output.mean, tpot_ms, self.kv_tokens, self.ctx)
        return self._sizes[tpot_ms]

    def _attended(self, prompt: float, tpot_ms: float) -> float:
        """Governed: what a prompt's later chunks take longer, since they attend to the earlier ones."""
        chunk = self.chunk(tpot_ms)
        if (behind := int((prompt - chunk) / 2)) <= 0:
            return 0.0
        dearer = self.model.prefill_ms(self.tp_size, chunk, behind) - self.model.prefill_ms(self.tp_size, chunk)
        return prompt / chunk * max(dearer, 0.0)

    def _bounded(self, tpot_ms: float) -> int:
        """As many may run with no step longer than the target, whatever prefill there is, up to what its budget is sized for; 0: none."""
        if tpot_ms not in self._fits:
            most, chunk = self._sized(tpot_ms)
            behind = depth(self.prompt.mean, chunk)

            def fits(b: int) -> bool:
                return step_ms(self.model, self.tp_size, chunk, b, self.ctx, behind) <= tpot_ms

            self._fits[tpot_ms] = largest(fits, most) if fits(1) else 0
        return self._fits[tpot_ms]

    def _mixed(self, batch: float, tpot_ms: float, flow: float) -> tuple[float, float]:
        """Governed: what a prompt's token takes, and by how much it delays the others, in a step beside this batch.

        Prompts share steps while others wait: one costs its part of a step, whatever it takes itself. Few steps are full, and the first
        tokens beside a large batch are cheaper: `flow` is what comes in a step.
        """
        chunk, b = self.chunk(tpot_ms), max(round(1 + batch), 1)
        part = max(min(int(max(self.prompt.mean, flow)), chunk), 1)
        whole = self.model.mixed_ms(self.tp_size, chunk, b, self.ctx)
        usual = whole if part == chunk else self.model.mixed_ms(self.tp_size, part, b, self.ctx)
        return whole / chunk, max(usual - self.decode(1 + batch), 0.0) / part

    def _took(self, points: Points, batch: float, tpot_ms: float) -> Points:
        """Governed: how long prompts take themselves beside this batch."""
        b, chunk = max(round(1 + batch), 1), self.chunk(tpot_ms)
        whole = self.model.mixed_ms(self.tp_size, chunk, b, self.ctx)
        rests = [int(p % chunk) for p, _ in points]
        return tuple(
            (p // chunk * whole + (self.model.mixed_ms(self.tp_size, rest, b, self.ctx) if rest else 0.0) + self._attended(p, tpot_ms), w)
            for (p, w), rest in zip(points, rests, strict=True)
        )

    def _settle(self, r: float, start: float, tpot_ms: float | None) -> Steady:
        """`r` in requests/ms; `tpot_ms` that the governor keeps, None: stock. Monotone fixed point from below."""
        mixed, mean = tpot_ms is not None, self.output.mean
        fixed = 0.0 if mixed else self.fixed
        own, stall = self.stock.own, self.stock.stall
        batch, tpot, busy, sized = start, 0.0, 0.0, -1.0
        later: tuple[float, ...] = ()
        if tpot_ms is not None:
            if tpot_ms not in self._later:
                self._later[tpot_ms] = tuple(self._attended(p, tpot_ms) for p, _ in self.prompts)
            later = self._later[tpot_ms]
        extra = sum(ms * w for ms, (_, w) in zip(later, self.prompts, strict=True)) if later else 0.0

        def stuck(limit: str, busy: float) -> Steady:
            return Steady(self.kv_batch, 0.0, busy, 0.0, 0.0, self.stock, limit=limit)

        for _ in range(40):
            if tpot_ms is not None and batch > sized * 1.1 + 1:
                token, delay = self._mixed(batch, tpot_ms, r * self.prompt.mean * tpot)
                own, stall, sized = token * self._tokens + extra, max(delay * self._tokens + extra, 1e-6), batch
            if r * (own if mixed else stall) >= (MIXED_BUSY_MAX if mixed else BUSY_MAX):
                return stuck("prefill", 1.0)
            decode = self.decode(1 + batch)  # a request sees itself and, on average, what runs at an instant
            prefills, steps = steady.steps(r, decode, stall, fixed)
            if steps <= 0:
                return stuck("prefill", 1.0)
            tpot, busy = 1 / steps, r * stall + prefills * fixed
            grown = r * mean * tpot
            if grown > self.kv_batch:
                return stuck("KV", busy)
            if grown <= batch * 1.005 + 0.02:
                batch = max(grown, batch)
                break
            batch = grown
        prompts = self.stock
        if tpot_ms is not None:
            each = self._took(self.prompts, sized, tpot_ms)
            own2, stall2 = (
                sum((of * p + ms) ** 2 * w for (p, w), ms in zip(self.prompts, later, strict=True)) * self.prompt.tail
                for of in (token, delay)
            )
            prompts = Prompts(each, own, own2, stall, max(stall2, 1e-12))
        return Steady(batch, tpot, busy, decode, prefills, prompts, sized)

    def at(self, rate: float, goal: Goal, start: float = 0.0, least: float = 0.0) -> Point:
        """`rate` in requests/s. `start`: the batch at a lower rate, to begin from. `least`: where fewer meet their TTFT, TPOT is not
        worked out."""
        r = rate / 1e3
        mixed = self.governed and goal.tpot_ms is not None
        fixed = 0.0 if mixed else self.fixed
        if not self.kv_fits or self.kv_batch < 1:
            return Point(0.0, 0.0, 0.0, 0.0, 0.0, "KV (one request does not fit)")
        key = r, start, goal.tpot_ms if mixed else None
        if (found := self._settled.get(key)) is None:
            found = self._settled[key] = self._settle(*key)
        batch, tpot, busy, decode, prompts = found.batch, found.tpot, found.busy, found.decode, found.prompts
        if found.limit:
            return Point(0.0, 0.0, batch, 0.0, busy, found.limit)
        rush = max(self.dispersion / self.crowd, EVEN)
        slope = self.decode(batch + 2) - self.decode(batch + 1)
        feedback = min(r * self.output.mean * slope / max(1 - busy, 0.03), 0.9)
        spread = math.sqrt(batch * (1 + rush) / 2 / (1 - feedback))
        shared = found.prefills / r * fixed if r > 0 else fixed
        waits = r * prompts.own if mixed else busy
        ttft = ttft_share(r, goal.ttft_ms, self.door, decode, waits, rush, self.crowd, prompts, prompts.each, fixed, mixed)
        if self.guests and ttft >= least:
            guests = self._took(self.guests, found.sized, goal.tpot_ms) if mixed and goal.tpot_ms is not None else self.stock_guests
            share = ttft_share(r, goal.guest_ttft_ms, self.door, decode, waits, rush, self.crowd, prompts, guests, fixed, mixed)
            ttft = min(ttft, share)
        ttft *= 1 - full(self.kv_batch - batch, spread, self.output.mean * tpot, rush, goal.ttft_ms)
        tpots = 1.0
        if goal.tpot_ms is not None and ttft >= least:
            wider = self.decode(1 + batch + spread * math.sqrt(LIVES)) - self.decode(1 + batch)
            tpots = tpot_share(r, goal.tpot_ms, tpot, wider, shared, busy, rush, prompts, self.lives, self.late)
            if mixed and tpots < 1 and (most := self._bounded(goal.tpot_ms)):
                room = most + 0.5 - batch
                tpots = max(tpots, NormalDist(0.0, max(spread * math.sqrt(LIVES), 1e-6)).cdf(room))
        return Point(ttft, tpots, batch, spread, busy)
