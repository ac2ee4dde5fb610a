"""The macro-step engine against SGLang's loop spelled out, one step at a time."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nitsum.layout import FlipMode
from nitsum.sim.engine import NEVER, Engine, EngineLimits, Happened, Seq
from nitsum.sim.steptimes import StepTimes


@dataclass(frozen=True)
class Straight:
    """A model with kinks in the context, so that runs cross them."""

    origin: str = "modelled"
    tp_sizes: tuple[int, ...] = (1,)

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        return 5 + 0.03 * chunk + 1e-5 * chunk * ctx

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return 4 + 0.1 * batch + batch * (0.001 * ctx + 0.004 * max(ctx - 70, 0))

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        return self.prefill_ms(tp_size, chunk) + self.decode_ms(tp_size, batch, ctx) - 4

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return 400

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        return 100.0


@dataclass
class Req:
    rid: int
    at: float
    prompt: int
    output: int
    max_new: int
    made: int = 0
    filled: int = 0
    warm: bool = False
    first: float = -1.0
    last: float = -1.0


@dataclass
class PerStep:
    """No shortcut: KV is summed up anew, one step after the other."""

    times: StepTimes
    kv: int
    limits: EngineLimits
    waiting: list[Req] = field(default_factory=list)
    running: list[Req] = field(default_factory=list)
    cut: Req | None = None
    full: bool = False
    ratio: float = 0.7
    now: float = 0.0
    retracted: int = 0

    def free(self, parts: list[tuple[Req, int]]) -> int:
        """Before a step's chunks are charged."""
        cut = self.cut.filled if self.cut else 0
        return self.kv - sum(r.prompt + r.made - 1 for r in self.running) - cut

    def admit(self, budget: int) -> list[tuple[Req, int, int]]:
        if not self.running:
            self.full = False
        if (self.full or not self.waiting) and self.cut is None:
            return []
        free = self.free([])
        offset = self.ratio * sum(min(r.max_new - r.made, 4096) for r in self.running)
        batch: list[tuple[Req, int, int]] = []
        if self.cut is not None:
            r, rest = self.cut, self.cut.prompt + self.cut.made - self.cut.filled
            room = min(budget, int(free - offset)) if int(free - offset) > 0 else budget
            n = min(rest, room, free)
            if n <= 0:
                return []
            batch.append((r, n, r.filled))
            r.filled += n
            offset += n + 1
            budget -= n
            free_now = free - n - 1
            if n == rest:
                self.cut = None
                offset += min(r.max_new, 4096)
        else:
            free_now = free
        while self.waiting and budget > 0:
            if len(self.running) + len(batch) >= self.limits.max_running:
                self.full = True
                break
            r = self.waiting[0]
            length = r.prompt + r.made
            if length + min(r.max_new - r.made, 4096) + 1 >= free - offset or free_now <= 0:
                self.full = bool(batch or self.running)
                break
            if self.cut is not None and length > budget and not r.warm:
                break
            self.waiting.pop(0)
            n = 1 if r.warm else min(length, budget)  # KV that is there already takes its room, and is looked at by the one new token
            held = length if r.warm else n
            batch.append((r, n, held - n))
            r.filled = held
            budget -= n
            free_now -= held + 1
            offset += held + 1
            if held < length:
                self.cut = r
            else:
                offset += min(r.max_new, 4096) if self.cut is None else 0
            if free - offset <= 0 or free_now <= 0:
                self.full = True
                break
        return batch

    def decode(self) -> None:
        for r in list(self.running):
            r.made += 1
            if r.made == r.output:
                r.last = self.now
                self.running.remove(r)
                self.full = False

    def step(self) -> bool:
        budget = self.limits.chunk
        beside = self.limits.mixed_tokens is not None and 0 < len(self.running) < budget  # else they take turns
        if self.limits.mixed_tokens is not None and self.running:
            budget = min(budget - len(self.running) if beside else budget, self.limits.mixed_tokens)
        batch = self.admit(budget) if budget else []
        b = len(self.running)
        ctx = sum(r.prompt + r.made - 1 for r in self.running) / b + 1 if b else 0.0
        if batch:
            parts = [(n, before) for _, n, before in batch]
            free = self.kv - sum(r.prompt + r.made - 1 for r in self.running) - sum(r.filled for r, _, _ in batch)
            mixed = beside and free >= b
            self.now += (self.times.mixed(parts, b, ctx) if mixed else self.times.prefill_batch(parts)) / 1e3
            if mixed:
                self.decode()
            for r, _, _ in batch:
                if r is not self.cut:
                    r.made, r.filled, r.warm = r.made + 1, 0, False
                    r.first = self.now if r.first < 0 else r.first
                    if r.made == r.output:
                        r.last, self.full = self.now, False
                    else:
                        self.running.append(r)
            return True
        if not b:
            self.ratio = 0.7
            return False
        if self.free([]) < b:
            gone: list[Req] = []
            while len(self.running) > 1 and (not gone or self.free([]) < len(self.running)):
                worst = min(self.running, key=lambda r: (r.made, -r.prompt, -r.rid))
                self.running.remove(worst)
                gone.append(worst)
            if self.free([]) < len(self.running) and self.cut:
                self.cut.filled = 0
                gone.append(self.cut)
                self.cut = None
            self.retracted += len(gone)
            self.waiting += gone
            self.full = False
            made, most = sum(r.made for r in self.running), sum(r.max_new for r in self.running)
            self.ratio = min(1.0, (made + 20 * len(self.running)) / (most + 1))
        else:
            self.ratio = max(self.ratio - (0.7 - 0.098) / 600, 0.098)
        b = len(self.running)
        self.now += self.times.decode(b, sum(r.prompt + r.made - 1 for r in self.running) / b + 1) / 1e3
        self.decode()
        return True

    def run(self, reqs: list[Req], until: float = NEVER) -> None:
        """A step that is under way at `until` is lost."""
        left = sorted(reqs, key=lambda r: (r.at, r.rid))
        while True:
            while left and left[0].at <= self.now:
                self.waiting.append(left.pop(0))
            before = [(r, replace(r)) for r in reqs]
            working = self.step()
            if self.now > until:
                for r, was in before:
                    r.made, r.first, r.last = was.made, was.first, was.last
                return
            if not working:
                if not left or left[0].at > until:
                    return
                self.now = left[0].at


def macro(engine: Engine, reqs: list[Req], until: float = NEVER) -> dict[int, tuple[float, float]]:
    """(first token, last) by rid; the engine goes on from there if it shall stop at `until`."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    left = sorted((r for r in reqs if r.at <= until), key=lambda r: (r.at, r.rid))
    events = 0
    while left or engine.next_at < NEVER:
        if left and left[0].at <= engine.next_at:
            r = left.pop(0)
            engine.submit(Seq(r.rid, r.prompt, r.output, r.max_new, r.made, r.warm), r.at)
            continue
        if engine.next_at > until:
            break
        now, events = engine.next_at, events + 1
        for what, seq in engine.advance():
            if what is Happened.FIRST:
                first.setdefault(seq.rid, now)
            else:
                assert seq.rid not in last, "finished twice"
                last[seq.rid] = now
        assert 0 <= engine.resident_tokens <= engine.kv_tokens
    assert until < NEVER or set(last) == {r.rid for r in reqs}
    return {rid: (at, last.get(rid, -1.0)) for rid, at in first.items()}


requests = st.lists(
    st.tuples(st.floats(0, 2, allow_subnormal=False), st.integers(1, 120), st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=25
)


@settings(max_examples=300, deadline=None)
@given(requests, st.integers(470, 900), st.sampled_from([32, 64, 8192]), st.sampled_from([None, 16, 50]), st.sampled_from([3, 4096]))
def test_macro_steps_equal_single_steps(raw: list[tuple[float, int, int, int]], kv: int, chunk: int, mixed: int | None, most: int) -> None:
    # Arrivals off any grid, so that none falls on the very end of a step.
    make = lambda: [Req(i, a + 1e-4 * (i + 1) / 7.3, p, o, o + extra) for i, (a, p, o, extra) in enumerate(raw)]  # noqa: E731
    limits = EngineLimits(chunk, most, mixed)
    reqs = make()
    for r in reqs:
        r.max_new = min(r.max_new, kv - r.prompt - 2)
        r.output = min(r.output, r.max_new)
    slow = PerStep(StepTimes(Straight(), 1), kv, limits)
    slow.run(reqs)
    engine = Engine(StepTimes(Straight(), 1), kv, limits)
    fast = macro(engine, make())
    event(f"retracts: {slow.retracted > 0}")
    assert engine.retractions == slow.retracted
    for r in reqs:
        assert fast[r.rid] == pytest.approx((r.first, r.last), rel=1e-6), r


@settings(max_examples=300, deadline=None)
@given(
    requests,
    st.integers(470, 900),
    st.sampled_from([32, 64, 8192]),
    st.sampled_from([None, 16, 50]),
    st.floats(0.01, 3, allow_subnormal=False),
    st.sampled_from([0, 1, 2, 3]),
)
def test_streams_that_are_stopped_and_resumed_equal_single_steps(
    raw: list[tuple[float, int, int, int]], kv: int, chunk: int, mixed: int | None, stop: float, kept: int
) -> None:
    """As at a flip: everything leaves at `stop`, and comes back a little later with what it has made; of `kept` in three the KV too."""
    limits, pause = EngineLimits(chunk, 4096, mixed), 0.05
    reqs = [Req(i, a + 1e-4 * (i + 1) / 7.3, p, 0, min(o + extra, kv - p - 2)) for i, (a, p, o, extra) in enumerate(raw)]
    for r, (_, _, o, _) in zip(reqs, raw, strict=True):
        r.output = min(o, r.max_new)
    slow, engine = PerStep(StepTimes(Straight(), 1), kv, limits), Engine(StepTimes(Straight(), 1), kv, limits)
    met = macro(engine, [replace(r) for r in reqs], stop)
    left = {s.rid: s for s in engine.stop(stop)}
    slow.run(reqs, stop)
    assert set(left) == {r.rid for r in reqs if r.at <= stop and r.last < 0}
    assert {rid: s.made for rid, s in left.items()} == {rid: reqs[rid].made for rid in left}, "tokens that had come by then"
    event(f"stopped: {bool(left)}, started ones: {any(s.made for s in left.values())}")
    for k, rid in enumerate(sorted(left)):
        r = reqs[rid]
        r.at, r.filled, r.warm = stop + pause + 1e-5 * (k + 1) / 7.3, 0, r.made > 0 and rid % 3 < kept
    again = [r for r in reqs if r.last < 0]
    for r in again:
        r.at = max(r.at, stop + pause + 1e-3 * (r.rid + 1) / 7.3) if r.rid not in left else r.at
    for rid, (first, last) in macro(engine, [replace(r) for r in again]).items():
        met[rid] = met.get(rid, (first, 0))[0], last
    after = PerStep(StepTimes(Straight(), 1), kv, limits)
    after.run(again)
    event(f"retracts after: {after.retracted > 0}")
    assert engine.retractions == slow.retracted + after.retracted
    for r in reqs:
        assert met[r.rid] == pytest.approx((r.first, r.last), rel=1e-6), r


def test_limits_beyond_the_clip_agree_too() -> None:
    reqs = [Req(i, 0.03 * i, 50, 400 + 37 * (i % 4), 4300 + 40 * (i % 7)) for i in range(60)]
    engine, slow = Engine(StepTimes(Straight(), 1), 60_000, EngineLimits()), PerStep(StepTimes(Straight(), 1), 60_000, EngineLimits())
    fast = macro(engine, reqs)
    slow.run(reqs)
    assert all(fast[r.rid] == pytest.approx((r.first, r.last)) for r in reqs)


def test_retraction_agrees_too() -> None:
    reqs = [Req(i, 0.01 * i, 20, 300, 300) for i in range(12)]
    engine, slow = Engine(StepTimes(Straight(), 1), 700, EngineLimits()), PerStep(StepTimes(Straight(), 1), 700, EngineLimits())
    fast = macro(engine, reqs)
    slow.run(reqs)
    assert engine.retractions == slow.retracted > 0
    assert all(fast[r.rid] == pytest.approx((r.first, r.last)) for r in reqs)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.floats(1, 3000), st.integers(1, 2000), st.floats(0, 1))
def test_closed_forms(batch: int, ctx: float, steps: int, part: float) -> None:
    t = StepTimes(Straight(), 1)
    each = [t.decode(batch, ctx + i) for i in range(steps)]
    assert t.decode_run(batch, ctx, steps) == pytest.approx(sum(each))
    budget = part * sum(each)
    done = t.steps_within(batch, ctx, steps, budget)
    assert sum(each[:done]) <= budget * (1 + 1e-6)
    assert done == steps or sum(each[: done + 1]) > budget * (1 - 1e-6)


@given(st.floats(0.001, 3), requests)
@settings(max_examples=60, deadline=None)
def test_a_stop_keeps_every_token_that_was_made(at: float, raw: list[tuple[float, int, int, int]]) -> None:
    engine = Engine(StepTimes(Straight(), 1), 500, EngineLimits())
    made: dict[int, int] = {}
    for i, (_, p, o, extra) in enumerate(raw):
        engine.submit(Seq(i, p, o, o + extra), 0.0)
    while engine.next_at <= at:
        for what, seq in engine.advance():
            if what is Happened.FINISHED:
                made[seq.rid] = seq.made
    ran, resident = set(engine.running), engine.resident_at(at)
    left = engine.stop(at)
    assert resident == sum(s.length - 1 for s in left if s.rid in ran)
    assert engine.next_at == NEVER
    assert engine.count == 0
    assert {*made} | {s.rid for s in left} == set(range(len(raw)))
    for s in left:  # they go on elsewhere
        engine.submit(s, at)
    while engine.next_at < NEVER:
        for what, seq in engine.advance():
            if what is Happened.FINISHED:
                made[seq.rid] = seq.made
    assert all(made[i] == min(o, 500 - p - 2) for i, (_, p, o, _) in enumerate(raw))
