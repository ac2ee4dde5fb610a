"""How large a share of a tier's requests meets TTFT and TPOT on one group at a rate, and the rate up to which the target share does.

Means do not tell: a request whose TTFT is met on average is missed half of the time. What is modelled (stock SGLang;
`tests/golden/test_capacity.py` compares it with the simulated engine over a grid):

- Prefill goes before decode. What arrived during a step is prefilled in one step next, so short prompts share a step's fixed part: the
  share of prefill steps is a fixed point. A TTFT is what is left of a step + work ahead and in the same batch (exponential tail, scaled by
  the variance of prompts and of arrivals) + the request's own prefill.
- A TPOT is a mean over the request's tokens, so it concentrates: its spread comes from the prefills that fall into its life and from how
  many others run beside it, both larger for short outputs and for bursts.
- With the governor decode never stops: a step carries at most `chunk` prefill tokens beside it, as many as the TPOT allows, so a prompt
  delays the others by less than its own time and takes longer itself.

Lengths are lognormal by mean and coefficient of variation, read at a few quantiles. TTFT and TPOT count as independent.
"""

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

from nitsum.governor import depth, largest, sizes, step_ms
from nitsum.perf import StepTimeModel, door_ms

CHUNK = 8192
"""New tokens of a prefill step of stock SGLang."""
QUANTILES = ((0.25, 0.5), (0.65, 0.3), (0.875, 0.15), (0.97, 0.04), (0.995, 0.01))
"""(quantile at which a length is read, share of the requests that it stands for)."""
LIVES = 0.75
"""Variance of the batch as one request sees it over its life, relative to the variance at an instant."""
BURST = 0.5
"""Of the others in a request's own burst: how many are prefilled after it, not with it."""
EVEN = 0.5
"""Least dispersion that one group of several can count on, however evenly routers spread what comes: their views are a second old."""
SHARED = 0.35
"""Power of the number of groups by which the wait for prefill falls; 1 if routers saw all there is to do."""
SPREAD, CONVEX, TAIL, MIXED_TAIL = 1.35, 0.8, 1.5, 1.3
"""Fitted to the simulated engine: load comes in waves, and a step's time grows faster than the load that it is taken at."""
MARGIN = 0.9
"""Of the rate found: the simulated engine's is rarely lower then."""
ZS = tuple((NormalDist().inv_cdf(q), w) for q, w in QUANTILES)
STEPS_GAP = 2e-4
"""Relative, of the share of prefill steps."""
BUSY_MAX, MIXED_BUSY_MAX = 0.85, 0.92
"""Share of the time that prefill may take: above it a little more load makes a long queue."""
Points = tuple[tuple[float, float], ...]
"""(value, share of requests)"""


@dataclass(frozen=True)
class Lengths:
    """Tokens. `cv`: standard deviation over mean; 0: all are equal."""

    mean: float
    cv: float = 0.0

    @cached_property
    def sigma(self) -> float:
        return math.sqrt(math.log1p(self.cv**2))

    @property
    def tail(self) -> float:
        """Mean square over that of `points`: a few points have not the spread of the whole."""
        points = self.points()
        return math.exp(self.sigma**2) / (sum(x * x * w for x, w in points) / max(self.mean, 1.0) ** 2)

    def points(self) -> tuple[tuple[float, float], ...]:
        """(tokens, share of requests)."""
        if not (sigma := self.sigma):
            return ((max(self.mean, 1.0), 1.0),)
        drawn = [(math.exp(sigma * z - sigma**2 / 2), w) for z, w in ZS]
        scale = self.mean / sum(x * w for x, w in drawn)  # a few points have not the mean of the whole
        return tuple((max(x * scale, 1.0), w) for x, w in drawn)


def running_length(prompt: float, output: Lengths) -> float:
    """Mean tokens of a stream that runs, prompt and what is made: it is seen for as long as its output takes, and long ones longest."""
    return prompt + output.mean * (1 + output.cv**2) / 2


@dataclass(frozen=True)
class Goal:
    """`share` of the requests must meet both. None: no such target. `guest_ttft_ms`: of the tier that shares the group (`Group.guest`)."""

    ttft_ms: float | None
    tpot_ms: float | None
    share: float
    guest_ttft_ms: float | None = None


@dataclass(frozen=True)
class Point:
    """Where a group stands at a rate. `batch`: requests that decode at an instant, on average; `batch_stddev` over time."""

    ttft_share: float
    tpot_share: float
    batch: float
    batch_stddev: float
    busy: float
    """Share of the time that prefill takes."""
    limit: str = ""
    """KV or prefill, where the group cannot follow at all."""

    @property
    def share(self) -> float:
        return 0.0 if self.limit else self.ttft_share * self.tpot_share


def _lognormal(x: float, mean: float, variance: float) -> float:
    """Share below x. Stalls only add: what is above the mean reaches further than what is below."""
    sigma2 = math.log1p(variance / mean**2)
    if sigma2 < 1e-12:
        return float(mean <= x)
    return 0.5 + 0.5 * math.erf((math.log(x / mean) + sigma2 / 2) / math.sqrt(2 * sigma2))


def _seen(busy: float, rush: float) -> float:
    """Share of arrivals that find work before them: more than the share of time if they come in bursts, less if they are spread evenly
    (GI/M/1, gamma gaps)."""
    seen = busy
    if rush != 1 and 0 < busy < 1:
        for _ in range(20):
            seen = (1 + (1 - seen) * rush / busy) ** (-1 / rush)
    return seen


@dataclass(frozen=True)
class Prompts:
    """What prompts cost, in ms: `own` the time that one takes, `stall` that by which it delays the others' decode; mean squares."""

    each: tuple[tuple[float, float], ...]
    own: float
    own2: float
    stall: float
    stall2: float

    @staticmethod
    def of(own: list[tuple[float, float]], stalls: list[tuple[float, float]], tail: float) -> "Prompts":
        """`tail`: by how much the mean squares are larger than those of the points."""
        moments = [sum(v**power * w for v, w in x) * (tail if power == 2 else 1.0) for x in (own, stalls) for power in (1, 2)]
        return Prompts(tuple(own), *moments)


@dataclass(frozen=True)
class Steady:
    """Where decode and prefill settle at a rate: what does not depend on bursts, nor on TTFT. Times in ms, `prefills` steps per ms."""

    batch: float
    tpot: float
    busy: float
    decode: float
    prefills: float
    prompts: Prompts
    sized: float = 0.0
    """Governed: the batch that steps were sized beside."""
    limit: str = ""


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
        one, two = self._prefill(mean), self._prefill(2 * mean)
        self.fixed = max(one - (two - one), 0.0) if 2 * mean <= CHUNK else 0.0
        """Of a prefill step, whatever it carries."""
        own = [(self._prefill(p), w) for p, w in self.prompts]
        self.stock = Prompts.of(own, [(max(s - self.fixed, 1e-6), w) for s, w in own], self.prompt.tail)
        self._tokens = sum(p * w for p, w in self.prompts)
        self._invite(self.guest)
        self.kv_batch = kv / max(running_length(mean, self.output), mean + self.output.mean, 1.0)

    def _invite(self, guest: Lengths | None) -> None:
        self.guest, self.guests = guest, guest.points() if guest else ()
        self.stock_guests = tuple((self._prefill(p), w) for p, w in self.guests)

    def among(self, crowd: int, dispersion: float, guest: Lengths | None) -> "Group":
        """The same engine and lengths under other bursts and guests: what was worked out for one serves the other."""
        other = copy.copy(self)
        other.crowd, other.dispersion = crowd, dispersion
        other._invite(guest)
        return other

    def _prefill(self, tokens: float) -> float:
        if tokens <= CHUNK:
            return self.model.prefill_ms(self.tp_size, max(int(tokens), 1))
        whole = int(tokens // CHUNK)
        took = sum(self.model.prefill_ms(self.tp_size, CHUNK, i * CHUNK) for i in range(whole))
        return took + (self.model.prefill_ms(self.tp_size, rest, whole * CHUNK) if (rest := int(tokens) - whole * CHUNK) > 0 else 0.0)

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

    def _steps(self, rate: float, decode: float, work: float, fixed: float) -> tuple[float, float]:
        """Per ms: (prefill steps, decode steps). What arrives in a step (Poisson) is prefilled in one step after it."""
        if not fixed:
            return rate, max(1 - rate * work, 0.0) / decode
        spare = 1 - rate * work
        if spare <= 0:
            return rate, 0.0
        after, grown = (1 - math.exp(-rate * decode)) / decode, rate * rate * work
        low, high = 0.0, min(rate, spare / fixed)
        steps = rate if rate < spare / fixed else high / 2
        for _ in range(16):
            # Root of ln(steps) - ln(free x after) - rate x lasting, which grows with steps: Newton's, within what is left by bisection.
            free = spare - steps * fixed
            above = math.log(steps / (free * after)) - min(rate * fixed + grown / steps, 50.0)
            if above > 0:
                high = steps
            elif steps >= rate:
                break
            else:
                low = steps
            step = steps - above / (1 / steps + fixed / free + grown / steps**2)
            near = abs(step - steps) <= STEPS_GAP * steps
            steps = step if low < step < high else (low + high) / 2
            if near or high - low <= STEPS_GAP * high:
                break
        return steps, max(spare - steps * fixed, 0.0) / decode

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
            prefills, steps = self._steps(r, decode, stall, fixed)
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
        ttft = self._ttft(r, goal.ttft_ms, decode, waits, rush, prompts, prompts.each, fixed, mixed)
        if self.guests and ttft >= least:
            guests = self._took(self.guests, found.sized, goal.tpot_ms) if mixed and goal.tpot_ms is not None else self.stock_guests
            ttft = min(ttft, self._ttft(r, goal.guest_ttft_ms, decode, waits, rush, prompts, guests, fixed, mixed))
        ttft *= 1 - self._full(batch, spread, tpot, rush, goal.ttft_ms)
        tpots = self._tpot(r, goal.tpot_ms, tpot, batch, spread, shared, busy, rush, prompts) if ttft >= least else 1.0
        if mixed and goal.tpot_ms is not None and tpots < 1 and (most := self._bounded(goal.tpot_ms)):
            room = most + 0.5 - batch
            tpots = max(tpots, NormalDist(0.0, max(spread * math.sqrt(LIVES), 1e-6)).cdf(room))
        return Point(ttft, tpots, batch, spread, busy)

    def _full(self, batch: float, spread: float, tpot: float, rush: float, target: float | None) -> float:
        """Share that waits too long for KV: finds no room, and as much does not end in time (M/M/N: each of `batch` lasts a life)."""
        room = self.kv_batch - batch
        over = 1 - NormalDist().cdf(room / max(spread, 1e-6))
        lives = (target or math.inf) / (self.output.mean * tpot * max(rush, 1.0))
        return over * math.exp(-room * lives)

    def _ttft(
        self,
        r: float,
        target: float | None,
        decode: float,
        busy: float,
        rush: float,
        prompts: "Prompts",
        each: tuple[tuple[float, float], ...],
        fixed: float,
        mixed: bool,
    ) -> float:
        if target is None:
            return 1.0
        served = prompts.own if mixed else prompts.stall
        cs2 = (prompts.own2 if mixed else prompts.stall2) / served**2 - 1
        tail = served * (rush + max(cs2, 0.0)) / (2 * max(1 - r * served, 0.03)) * (MIXED_TAIL if mixed else (1 + busy) * TAIL)
        tail = tail / self.crowd**SHARED + fixed / 2
        seen = _seen(busy, rush)
        share = 0.0
        for own, weight in each:
            room = target - own - self.door
            # An idle engine starts at once; one that decodes ends its step first, uniformly; else work is ahead.
            idle = max(min(room / decode, 1.0), 0.0) if room > 0 else 0.0
            behind = 1 - math.exp(-(room - decode / 2) / tail) if room > decode / 2 else 0.0
            share += weight * ((1 - seen) * idle + seen * behind)
        return share

    def _tpot(
        self,
        r: float,
        target: float | None,
        tpot: float,
        batch: float,
        spread: float,
        fixed: float,
        busy: float,
        rush: float,
        prompts: "Prompts",
    ) -> float:
        if target is None:
            return 1.0
        wide = (self.decode(1 + batch + spread * math.sqrt(LIVES)) - self.decode(1 + batch)) / max(1 - busy, 0.03)
        stall2 = prompts.stall2 + 2 * prompts.stall * fixed + fixed**2
        # Of one step. A stall lasts while more arrive: as the busy period of a queue, hence the division.
        stalls2 = r * tpot * stall2 * rush / max(1 - busy, 0.03) ** 2
        burst = BURST * max(rush - 1, 0.0) / 2 * (prompts.stall + fixed) / max(1 - busy, 0.03)
        share = 0.0
        for steps, weight in self.lives:
            spread2 = SPREAD**2 * (wide**2 + stalls2 / steps)
            share += weight * _lognormal(target, tpot + (burst + self.late) / steps + CONVEX * spread2 / tpot, spread2)
        return share


@dataclass(frozen=True)
class Safe:
    """`rate` requests/s; `binding` names what breaks just above it; `batch`: how many may run at once."""

    rate: float
    binding: str
    batch: int
    partly: float | None = None
    """Not None: `rate` is what a part of the requests would meet, which is more than this, the rate at which the goal's share does."""
    attained: tuple[float, float] = (1.0, 1.0)
    """Shares met at half of the rate, and at the rate."""


def binding_of(p: Point) -> str:
    return p.limit or ("TPOT" if p.tpot_share < p.ttft_share else "TTFT")


def safe(group: Group, goal: Goal) -> Safe:
    """The largest rate at which the goal's share is met, within 1 %. Rate 0 where even a lone request misses a target."""

    held = Point(1.0, 1.0, 0.0, 0.0, 0.0)
    broken = 1e-3, 0.0

    def misses(rate: float) -> bool:
        nonlocal held, broken
        p = group.at(rate, goal, held.batch, goal.share)
        if missed := p.share < goal.share:
            broken = rate, held.batch
        else:
            held = p
        return missed

    if misses(1e-3):
        return Safe(0.0, binding_of(group.at(1e-3, goal)), 0)
    low, high = 0.0, 0.25 / group.stock.stall * 1e3
    while not misses(high):
        low, high = high, high * 2
    for _ in range(20):
        if high - low <= 0.01 * high:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if misses(middle) else (middle, high)
    batch = math.ceil(1 + held.batch + 2 * held.batch_stddev)
    half, whole = (group.at(part * MARGIN * low, goal).share for part in (0.5, 1.0))
    binding = binding_of(group.at(broken[0], goal, broken[1]))
    return Safe(MARGIN * low, binding, min(batch, max(int(group.kv_batch), 1)), attained=(half, whole))
