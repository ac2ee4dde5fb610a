"""One engine's continuous batching, as SGLang 0.5 does it with stock settings, advanced in macro-steps.

As in `scheduler.py` and `schedule_policy.py` there: prefill goes before decode; a prefill step takes waiting requests first come, first
served, up to `chunk` new tokens, cutting the last prompt; no decode runs while a prompt is cut, unless the governor's budget mixes prefill
into decode steps. A request is let in if its prompt and whole output fit beside what the running ones are estimated to make yet (their
limit x new-token ratio); when decode finds no room, those with the least output are retracted and prefilled again later.

Between two events (a finish, the end of the KV, an arrival that may be let in) decode steps run in closed form: `steps` counts them, and
a sequence that joined at `base` has made `steps - base` tokens. Cost grows with requests, not tokens.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from nitsum import governor
from nitsum.sim.steptimes import StepTimes

RATIO_INIT, RATIO_MIN, RATIO_DECAY_STEPS = 0.7, 0.7 * 0.14, 600
NEW_TOKENS_CLIP = 4096
RETRACT_STEPS = 20
NEVER = math.inf


@dataclass(frozen=True)
class EngineLimits:
    """`chunk`: new prefill tokens of one step. `mixed_tokens`: the governor's prefill tokens per step beside decode; None: stock."""

    chunk: int = 8192
    max_running: int = 4096
    mixed_tokens: int | None = None
    hands_over: bool = False
    """A sequence leaves with its first token: another group decodes it."""


@dataclass(slots=True, eq=False)
class Seq:
    """One submission. `made` tokens exist already (a resumed stream); `warm`: so does their KV. `base` while it runs: see above."""

    rid: int
    prompt: int
    output: int
    max_new: int
    made: int = 0
    warm: bool = False
    base: int = 0
    filled: int = 0
    clipped: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.made


class Happened(Enum):
    FIRST = 1
    """A prefill ended: the first token of this submission."""
    FINISHED = 2
    HANDED_OVER = 3


class _Work(Enum):
    IDLE, PREFILL, DECODE = range(3)


@dataclass(eq=False)
class Engine:
    """Doors: `submit`, `advance` at `next_at`, `stop`. Times are seconds."""

    times: StepTimes
    kv_tokens: int
    limits: EngineLimits = EngineLimits()
    next_at: float = NEVER
    steps: int = 0
    held: int = 0
    """KV tokens of running sequences, the cut prompt's not among them."""
    running: dict[int, Seq] = field(default_factory=dict)
    waiting: deque[Seq] = field(default_factory=deque)
    retractions: int = 0
    _ends: list[tuple[int, int]] = field(default_factory=list)
    _cut: Seq | None = None
    _full: bool = False
    _ratio: float = RATIO_INIT
    _promised: int = 0
    """Sum over running of max_new + base: what they have left to make, at most, is this less steps x their number."""
    _clipped: int = 0
    """Running ones that have more left than NEW_TOKENS_CLIP; they are not in `_promised`."""
    _unclips: list[tuple[int, int, int]] = field(default_factory=list)
    """(step, rid, base) at which such a one has no more than that left."""
    _work: _Work = _Work.IDLE
    _since: float = 0.0
    _run: int = 0
    _undecayed: bool = False
    _mixed: bool = False
    _parts: list[tuple[Seq, int]] = field(default_factory=list)
    busy_s: float = 0.0

    @property
    def resident_tokens(self) -> int:
        """As of the last event; see `resident_at`."""
        return self.held + (self._cut.filled if self._cut else 0)

    def resident_at(self, now: float) -> int:
        """KV tokens of what runs, those of a decode run that is under way among them."""
        return self.resident_tokens + self._made_since(now) * len(self.running)

    def made_at(self, now: float) -> Iterator[tuple[int, int]]:
        """Of each that runs: its rid, and the tokens that it has made."""
        steps = self.steps + self._made_since(now)
        return ((rid, steps - seq.base) for rid, seq in self.running.items())

    def _made_since(self, now: float) -> int:
        """Whole steps of the decode run that have ended; one that is due now ends by `advance`."""
        if self._work is not _Work.DECODE:
            return 0
        done = self.times.steps_within(len(self.running), self._ctx(), self._run, (now - self._since) * 1e3)
        return min(done, self._run - 1)

    @property
    def count(self) -> int:
        return len(self.running) + len(self.waiting) + (self._cut is not None) + sum(s is not self._cut for s, _ in self._parts)

    def fits(self, prompt: int) -> bool:
        return prompt + 2 < self.kv_tokens

    def submit(self, seq: Seq, now: float) -> None:
        """Needs `fits`. `next_at` may change."""
        assert self.fits(seq.prompt + seq.made), (seq, self.kv_tokens)
        seq.max_new = min(seq.max_new, self.kv_tokens - seq.prompt - 2)
        seq.output = min(seq.output, seq.max_new)
        self.waiting.append(seq)
        if self._work is _Work.IDLE:
            self._plan(now)
        elif self._work is _Work.DECODE and not self._full and len(self.waiting) == 1:
            self._shorten(now)

    def _shorten(self, now: float) -> None:
        """The decode run ends with the step that is under way."""
        b, ctx = len(self.running), self._ctx()
        done = self.times.steps_within(b, ctx, self._run, (now - self._since) * 1e3)
        if done < self._run:
            self._run = done + 1
            self.next_at = self._since + self.times.decode_run(b, ctx, self._run) / 1e3

    def _ctx(self) -> float:
        return self.held / len(self.running) + 1

    def advance(self) -> list[tuple[Happened, Seq]]:
        """Ends the work that is due at `next_at` and begins the next."""
        now, happened = self.next_at, []
        self.busy_s += now - self._since
        if self._work is _Work.DECODE:
            happened = self._decoded(self._run)
            self._ratio = max(self._ratio - (self._run - self._undecayed) * (RATIO_INIT - RATIO_MIN) / RATIO_DECAY_STEPS, RATIO_MIN)
        elif self._work is _Work.PREFILL:
            if self._mixed:
                happened = self._decoded(1)
            happened += self._prefilled()
        self._plan(now)
        return happened

    def _decoded(self, steps: int) -> list[tuple[Happened, Seq]]:
        self.steps += steps
        self.held += steps * len(self.running)
        happened = []
        while self._ends and self._ends[0][0] <= self.steps:
            seq = self._leave(heapq.heappop(self._ends)[1])
            assert seq.made == seq.output, seq
            self._full = False
            happened.append((Happened.FINISHED, seq))
        return happened

    def _leave(self, rid: int) -> Seq:
        """From running; its entry in `_ends` is the caller's."""
        seq = self.running.pop(rid)
        seq.made = self.steps - seq.base
        self.held -= seq.prompt + seq.made - 1
        if seq.clipped:
            self._clipped -= 1
        else:
            self._promised -= seq.max_new + seq.base
        return seq

    def _join(self, seq: Seq) -> None:
        seq.base, seq.filled, seq.warm = self.steps - seq.made, 0, False
        self.running[seq.rid] = seq
        self.held += seq.prompt + seq.made - 1
        seq.clipped = seq.max_new - seq.made > NEW_TOKENS_CLIP
        if seq.clipped:
            self._clipped += 1
            heapq.heappush(self._unclips, (seq.base + seq.max_new - NEW_TOKENS_CLIP, seq.rid, seq.base))
        else:
            self._promised += seq.max_new + seq.base
        heapq.heappush(self._ends, (seq.base + seq.output, seq.rid))

    def _prefilled(self) -> list[tuple[Happened, Seq]]:
        happened = []
        for seq, _ in self._parts:
            if seq is self._cut:
                continue
            seq.made += 1
            happened.append((Happened.FIRST, seq))
            if seq.made >= seq.output:
                self._full = False
                happened.append((Happened.FINISHED, seq))
            elif self.limits.hands_over:
                self._full = False
                happened.append((Happened.HANDED_OVER, seq))
            else:
                self._join(seq)
        self._parts = []
        return happened

    def _plan(self, now: float) -> None:
        """Chooses what runs next."""
        self._since, self._mixed = now, False
        # As the plugin does in real engines.
        beside = governor.room(self.limits.mixed_tokens or 0, len(self.running), self.limits.chunk)
        budget = beside.tokens
        self._parts = self._admit(budget) if budget and (self._cut or self.waiting) else []
        if self._parts:
            self._work = _Work.PREFILL
            parts = [(n, seq.filled - n) for seq, n in self._parts]
            b = len(self.running)
            if beside.mixed and self._room() >= b:
                self._mixed = True
                took = self.times.mixed(parts, b, self._ctx())
            else:
                took = self.times.prefill_batch(parts)
            self.next_at = now + took / 1e3
            return
        if not self.running:
            assert not self.waiting, "an idle engine leaves requests waiting"
            assert self._cut is None, "an idle engine leaves a prompt cut"
            self._work, self.next_at, self._ratio = _Work.IDLE, NEVER, RATIO_INIT
            return
        self._undecayed = self._free() < len(self.running)
        if self._undecayed:
            self._retract()
        b = len(self.running)
        self._work, self._run = _Work.DECODE, self._ends[0][0] - self.steps
        if self._run * b > (room := self._free()):
            self._run = max(room // b, 1)
        if (self.waiting or self._cut) and not self._full:
            self._run = 1
        self.next_at = now + self.times.decode_run(b, self._ctx(), self._run) / 1e3

    def _free(self) -> int:
        """KV tokens that nothing holds, between two steps."""
        return self.kv_tokens - self.held - (self._cut.filled if self._cut is not None else 0)

    def _room(self) -> int:
        """For decode beside the prefill step in `_parts`."""
        return self.kv_tokens - self.held - sum(s.filled for s, _ in self._parts)

    def _estimated(self) -> float:
        """Tokens that the running ones will make yet, by the ratio."""
        while self._unclips and self._unclips[0][0] <= self.steps:
            _, rid, base = heapq.heappop(self._unclips)
            seq = self.running.get(rid)
            if seq is not None and seq.clipped and seq.base == base:
                seq.clipped = False
                self._clipped -= 1
                self._promised += seq.max_new + seq.base
        left = self._clipped * NEW_TOKENS_CLIP + self._promised - self.steps * (len(self.running) - self._clipped)
        return left * self._ratio

    def _admit(self, budget: int) -> list[tuple[Seq, int]]:
        """The next prefill step: (sequence, new tokens), `filled` and `_cut` brought up to date."""
        if not self.running:
            self._full = False
        if self._full and self._cut is None:
            return []
        free = self._free()
        total = free - self._estimated()
        parts: list[tuple[Seq, int]] = []
        if (seq := self._cut) is not None:
            room = min(budget, int(total)) if int(total) > 0 else budget
            n = min(seq.length - seq.filled, room, free)
            if n <= 0:
                return []
            self._cut = seq if seq.filled + n < seq.length else None
            seq.filled += n
            parts.append((seq, n))
            budget, free = budget - n, free - n - 1
            total -= n + 1 + (min(seq.max_new, NEW_TOKENS_CLIP) if self._cut is None else 0)
        while self.waiting and budget > 0 and not self._full:
            if len(self.running) + len(parts) >= self.limits.max_running:
                self._full = True
                break
            seq = self.waiting[0]
            new = min(max(seq.max_new - seq.made, 0), NEW_TOKENS_CLIP)
            if seq.length + new + 1 >= total or free <= 0:
                self._full = bool(parts or self.running)
                break
            if self._cut is not None and not seq.warm and seq.length > budget:
                break  # one cut prompt at a time
            seq = self.waiting.popleft()
            n = 1 if seq.warm else min(seq.length, budget)
            held = seq.length if seq.warm else n
            seq.filled = held
            if held < seq.length:
                self._cut = seq
            parts.append((seq, n))
            budget, free = budget - n, free - held - 1
            total -= held + 1 + (min(seq.max_new, NEW_TOKENS_CLIP) if self._cut is None else 0)
            if total <= 0 or free <= 0:
                self._full = True
        return parts

    def _retract(self) -> None:
        """Those with the least output first, of equals the longest prompt; at least one goes, at least one stays."""
        order = sorted(self.running.values(), key=lambda s: (self.steps - s.base, -s.prompt, -s.rid))
        gone: list[Seq] = []
        for seq in order[:-1]:
            gone.append(self._leave(seq.rid))
            if self._free() >= len(self.running):
                break
        if self._free() < len(self.running) and self._cut is not None:  # SGLang would abort the last one; we let the cut prompt start anew
            self._cut.filled = 0
            gone.append(self._cut)
            self._cut = None
        out = {s.rid for s in gone}
        self._ends = [e for e in self._ends if e[1] not in out]
        heapq.heapify(self._ends)
        self.retractions += len(gone)
        left = self.running.values()
        made = sum(self.steps - s.base for s in left)
        self._ratio = min(1.0, (made + RETRACT_STEPS * len(left)) / (sum(s.max_new for s in left) + 1))
        self._full = False
        self.waiting.extend(gone)

    def stop(self, now: float) -> list[Seq]:
        """Everything leaves, with the tokens it has made by now; a step that is under way is lost."""
        done = self._made_since(now)
        self.steps += done
        self.held += done * len(self.running)
        if self._work is not _Work.IDLE:
            self.busy_s += now - self._since
        left = [self._leave(rid) for rid in list(self.running)]
        left += [s for s, _ in self._parts if s is not self._cut]
        left += [self._cut] if self._cut else []
        left += self.waiting
        for seq in left:
            seq.filled = 0
        self.waiting.clear()
        self._parts, self._ends, self._unclips, self._cut, self._full = [], [], [], None, False
        self._work, self.next_at, self._ratio = _Work.IDLE, NEVER, RATIO_INIT
        assert (self.held, self._promised) == (0, 0), (self.held, self._promised)
        return left
