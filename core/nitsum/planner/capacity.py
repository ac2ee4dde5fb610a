"""SLO-safe capacity of one group for one tier, remembered: it depends on lengths and targets, not on rates, and lengths move slowly."""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

from nitsum.attainment import MARGIN, Goal, Group, Lengths, Safe, safe
from nitsum.demand import TierDemand
from nitsum.governor import CHUNK_MIN, LUMP, prefill_budget, sizes, streams_max
from nitsum.layout import Role
from nitsum.perf import StepTimeModel
from nitsum.planner import handover
from nitsum.planner.problem import Kind

REMEMBERED_MAX, ENGINES_MAX = 8192, 256
STEP, SPREAD, COARSE = 1.05, 1.2, 1.5
"""Means of lengths count as the nearest power of the first, spreads of the second, burstiness of the third: no estimate of them is better,
and it keeps plans from trembling."""
PRIOR_PROMPT, PRIOR_OUTPUT = 256.0, 128.0
"""Tokens, of a tier nobody has asked for yet."""


def rounded(value: float, step: float) -> float:
    return step ** round(math.log(max(value, 1.0)) / math.log(step))


@dataclass(frozen=True)
class Mark:
    """What of a tier's demand its capacity depends on, rounded. Spreads: mean square over square of the mean."""

    prompt: float
    prompt_spread: float
    output: float
    output_spread: float
    dispersion: float


def mark(d: TierDemand) -> Mark:
    prompt, output = rounded(d.prompt_tokens_mean or PRIOR_PROMPT, STEP), rounded(d.output_tokens_mean or PRIOR_OUTPUT, STEP)
    prompts, outputs = rounded(1 + d.prompt_tokens_cv**2, SPREAD), rounded(1 + d.output_tokens_cv**2, SPREAD)
    return Mark(prompt, prompts, output, outputs, rounded(d.cv**2, COARSE))


def lengths(mean: float, spread: float) -> Lengths:
    return Lengths(mean, math.sqrt(max(spread - 1, 0.0)))


HALF = 0.5
FAR = 1.3
"""A length that has moved by more is looked at at once."""


def near(a: Mark, b: Mark) -> bool:
    pairs = ((a.prompt, b.prompt, FAR), (a.output, b.output, FAR), (a.dispersion, b.dispersion, 2.0))
    return all(max(x, y) <= most * min(x, y) for x, y, most in pairs)


def _near(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    """Of guests: prompt and its spread."""
    return a == b or (a is not None and b is not None and max(a[0], b[0]) <= FAR * min(a[0], b[0]))


def version(model: StepTimeModel) -> object:
    """What tells step-time models apart: a profile's name, and which of its corrections (`correction.Corrected`)."""
    return getattr(model, "name", id(model)), getattr(model, "version", 0)


class Capacity:
    """What a TP group can safely serve of one tier alone. Bounded; the oldest goes first.

    `left`: how many may be computed anew before `of` answers with what it last knew of lengths near these; None: any number.
    """

    def __init__(self, governed: bool = False) -> None:
        """`governed`: engines size their prefill steps by TPOT."""
        self.governed = governed
        self._known: OrderedDict[tuple[object, ...], Safe] = OrderedDict()
        self._engines: OrderedDict[tuple[object, ...], Group] = OrderedDict()
        self._latest: OrderedDict[tuple[object, ...], tuple[Mark, tuple[float, float] | None, Safe]] = OrderedDict()
        self._sizes: OrderedDict[tuple[object, ...], tuple[int, int]] = OrderedDict()
        self._kinds: OrderedDict[str, tuple[object, dict[tuple[object, ...], tuple[Kind | None, bool]]]] = OrderedDict()
        self._kv_tokens: OrderedDict[tuple[object, ...], int] = OrderedDict()
        self._numbers: OrderedDict[Mark, int] = OrderedDict()
        self._next = 0
        self.left: int | None = None
        self.guessed = False
        """Whether an answer was what was known of other lengths."""

    def number(self, m: Mark) -> int:
        """Stands for it in keys, for hashing it takes longer."""
        if (found := self._numbers.get(m)) is None:
            found = self._numbers[m] = self._next
            self._next += 1  # never given again: keys with those that are forgotten live on
            if len(self._numbers) > REMEMBERED_MAX:
                self._numbers.popitem(last=False)
        return found

    def kinds(self, pool: str, asked: object) -> dict[tuple[object, ...], tuple[Kind | None, bool]]:
        """Kinds of groups made of these answers, for who asks to fill, and whether none of them was guessed; emptied when `asked` changes,
        or there are too many."""
        if (found := self._kinds.get(pool)) is None or found[0] != asked or len(found[1]) > REMEMBERED_MAX:
            found = self._kinds[pool] = asked, {}
            self._kinds.move_to_end(pool)
            while len(self._kinds) > ENGINES_MAX:
                self._kinds.popitem(last=False)
        return found[1]

    def of(
        self,
        model: StepTimeModel,
        tp_size: int,
        tier: str,
        m: Mark,
        goal: Goal,
        resident: tuple[int, ...],
        guest: tuple[float, float] | None = None,
        partly: bool = False,
        crowd: int = 1,
        role: Role = Role.MIXED,
        load_ms: float = 0.0,
    ) -> Safe:
        """`tier`: of whom, and its guest; tells apart what was last known. `guest`: prompt and its spread of a stricter tier that shares
        the group.

        `crowd`: groups among which routers spread what comes, so that each sees less of the bursts.

        `partly`: near targets that cannot be held, more requests meet them at a rate at which many do not: that counts. The second try
        is what would hold without bursts, so that of TPs of which none holds the nearest is preferred.

        `load_ms`: of a mean prompt's KV, into a group that only decodes.
        """
        rest = version(model), tp_size, goal, resident, partly, role
        key, last = (*rest, guest, m, crowd, load_ms), (*rest, tier)
        if (found := self._known.get(key)) is not None:
            if self.left is not None:
                self._latest[last] = m, guest, found
            return found
        if self.left == 0 and (before := self._latest.get(last)) is not None and near(before[0], m) and _near(before[1], guest):
            self.guessed = True
            return before[2]
        other = lengths(*guest) if guest else None
        engine = self._engine(model, tp_size, m, resident, role, load_ms)
        found = safe(engine.among(crowd, m.dispersion, other), goal)
        held = found.rate
        for part, rush in ((HALF, m.dispersion), (HALF**2, 1.0)) if partly else ():
            group, looser = engine.among(crowd, rush, other), replace(goal, share=min(goal.share, HALF))
            if found.rate and group.at(found.rate / part / MARGIN, looser).share < looser.share:
                continue  # fewer than that part meet them where it would take as many to count for more
            some = safe(group, looser)
            if part * some.rate > found.rate:
                found = Safe(part * some.rate, found.binding, some.batch, held)
        self._known[key] = found
        self._latest[last] = m, guest, found
        self.left = self.left - 1 if self.left else self.left
        for known in (self._known, self._latest):
            while len(known) > REMEMBERED_MAX:
                known.popitem(last=False)
        return found

    def _engine(self, model: StepTimeModel, tp_size: int, m: Mark, resident: tuple[int, ...], role: Role, load_ms: float) -> Group:
        key = version(model), tp_size, m.prompt, m.prompt_spread, m.output, m.output_spread, resident, role, load_ms
        if (found := self._engines.get(key)) is None:
            prompt, output = lengths(m.prompt, m.prompt_spread), lengths(m.output, m.output_spread)
            if role is Role.MIXED:
                found = Group(model, tp_size, prompt, output, governed=self.governed, resident_tp=resident)
            else:
                found = handover.engine(role, model, tp_size, prompt, output, resident, load_ms)
            self._engines[key] = found
            if len(self._engines) > ENGINES_MAX:
                self._engines.popitem(last=False)
        return found

    def kv_tokens(self, model: StepTimeModel, tp_size: int, resident: tuple[int, ...]) -> int:
        key = version(model), tp_size, resident
        if (found := self._kv_tokens.get(key)) is None:
            found = self._kv_tokens[key] = model.kv_capacity_tokens(tp_size, resident)
            if len(self._kv_tokens) > REMEMBERED_MAX:
                self._kv_tokens.popitem(last=False)
        return found

    def decode_size(
        self, model: StepTimeModel, tp_size: int, prompt: float, output: float, tpot_ms: float, resident: tuple[int, ...]
    ) -> tuple[int, int]:
        """As `size`, of a group that only decodes. Prefill beside it is for what comes without its KV, as after a flip: then steps may last
        LUMP times as long, or all that comes waits behind those few."""
        prompt, output = rounded(prompt, STEP), rounded(output, STEP)
        key = version(model), tp_size, prompt, output, tpot_ms, resident, Role.DECODE
        if key not in self._sizes:
            most = streams_max(model, tp_size, prompt, output, tpot_ms, self.kv_tokens(model, tp_size, resident))
            chunk = prefill_budget(model, tp_size, most, max(int(prompt + output / 2), 1), LUMP * tpot_ms)
            self._sizes[key] = most, max(chunk, CHUNK_MIN)
            if len(self._sizes) > REMEMBERED_MAX:
                self._sizes.popitem(last=False)
        return self._sizes[key]

    def size(
        self, model: StepTimeModel, tp_size: int, prompt: float, output: float, tpot_ms: float, resident: tuple[int, ...], ctx: float = 0.0
    ) -> tuple[int, int]:
        """(requests that may run, prefill tokens of a step beside them) so that streams keep `tpot_ms`; see `governor.sizes`."""
        prompt, output, ctx = rounded(prompt, STEP), rounded(output, STEP), rounded(ctx, STEP) if ctx else 0.0
        key = version(model), tp_size, prompt, output, tpot_ms, resident, ctx
        if key not in self._sizes:
            self._sizes[key] = sizes(model, tp_size, prompt, output, tpot_ms, self.kv_tokens(model, tp_size, resident), int(ctx))
            if len(self._sizes) > REMEMBERED_MAX:
                self._sizes.popitem(last=False)
        return self._sizes[key]
