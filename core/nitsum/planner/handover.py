"""Engines that only prefill or only decode, for the attainment model that mixed ones have: so their capacities can be compared.

Prefill: nothing decodes beside prompts, so TTFT alone binds. Decode: what is handed over comes with its KV; a step that takes some in is
longer by what a last part of a page costs, and a stream's first token here is late by its way through the gateway, the copy of its prompt
and a wait for the links behind others': its TPOT pays for that, so short outputs cannot. Streams for which there is no place wait in front
of their prefill, so a block takes what the weaker of its two sides can.
"""

import math
from dataclasses import replace

from nitsum.attainment import Goal, Group, Lengths
from nitsum.governor import step_ms
from nitsum.layout import Role
from nitsum.perf import StepTimeModel, door_ms

WAY_MS = 25.0
"""Allowed from a stream's end here to its submission there, besides the copy: abort, router, admission."""
LINKS_MAX = 0.7
"""Part of the time that a group's links may take in KV."""
JOINS = 16, 32
"""Tokens of a page that are computed again, beside so many streams: what a step that takes streams in is longer for."""
MANY = 2048
"""Tokens of a prefill step that is no longer short."""
STEP_MS = 0.05
"""Of decode where there is none."""


class Prefilling:
    """`model` where nothing decodes. Implements StepTimeModel.

    Its steps carry many short prompts, and a step's time grows little with its first tokens: what one short prompt more costs is told by
    steps of MANY tokens, not by two such prompts alone.
    """

    def __init__(self, model: StepTimeModel) -> None:
        self.model, self.origin, self.tp_sizes = model, model.origin, model.tp_sizes
        self._lines: dict[int, tuple[float, float]] = {}

    def door_ms(self, tp_size: int) -> float:
        return door_ms(self.model, tp_size)

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        took = self.model.prefill_ms(tp_size, chunk, ctx)
        if ctx or chunk >= MANY:
            return took
        if tp_size not in self._lines:
            least = self.model.prefill_ms(tp_size, 1)
            self._lines[tp_size] = least, (self.model.prefill_ms(tp_size, MANY) - least) / MANY
        fixed, each = self._lines[tp_size]
        return max(took, fixed + each * chunk)

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return STEP_MS

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        return self.model.prefill_ms(tp_size, chunk)

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return self.model.kv_capacity_tokens(tp_size, resident_tp)


class Decoding:
    """`model` where prompts come prefilled. Implements StepTimeModel."""

    def __init__(self, model: StepTimeModel, prompt: float) -> None:
        self.model, self.origin, self.tp_sizes = model, model.origin, model.tp_sizes
        self.prompt = max(int(prompt), 1)
        self._joins: dict[int, float] = {}

    def prefill_ms(self, tp_size: int, chunk: int, ctx: int = 0) -> float:
        """What a step is longer that takes a stream in. By its tokens: to the model above, each comes in a step of its own."""
        if tp_size not in self._joins:
            tokens, batch = JOINS
            joined = step_ms(self.model, tp_size, tokens, batch, self.prompt, self.prompt)
            self._joins[tp_size] = max(joined - self.model.decode_ms(tp_size, batch, self.prompt), 0.05)
        return self._joins[tp_size] * chunk / self.prompt

    def decode_ms(self, tp_size: int, batch: int, ctx: int) -> float:
        return self.model.decode_ms(tp_size, batch, ctx)

    def mixed_ms(self, tp_size: int, chunk: int, batch: int, ctx: int) -> float:
        return self.model.decode_ms(tp_size, batch, ctx)

    def kv_capacity_tokens(self, tp_size: int, resident_tp: tuple[int, ...]) -> int:
        return self.model.kv_capacity_tokens(tp_size, resident_tp)


def engine(
    role: Role, model: StepTimeModel, tp_size: int, prompt: Lengths, output: Lengths, resident: tuple[int, ...], load_ms: float = 0.0
) -> Group:
    """One engine in a role that is not Mixed. `load_ms`: of the KV of a mean prompt."""
    if role is Role.PREFILL:
        return Group(Prefilling(model), tp_size, prompt, Lengths(1.0), resident_tp=resident)
    late = late_ms(model, tp_size, prompt.mean, load_ms)
    return Group(Decoding(model, prompt.mean), tp_size, prompt, output, resident_tp=resident, late=late)


def late_ms(model: StepTimeModel, tp_size: int, prompt: float, load_ms: float) -> float:
    """Between a stream's first token and its first step where it is decoded: way, copy behind others' copies, a step that is under way."""
    behind = LINKS_MAX / (2 * (1 - LINKS_MAX))
    return WAY_MS + load_ms * (1 + behind) + model.decode_ms(tp_size, JOINS[1], int(prompt))


def goal_in(role: Role, goal: Goal) -> Goal:
    """What must hold of one side, so that both together hold the goal's share."""
    share = math.sqrt(goal.share)
    if role is Role.PREFILL:
        return replace(goal, tpot_ms=None, share=share)
    return Goal(None, goal.tpot_ms, share)


def linked(load_ms: float) -> float:
    """requests/s whose KV a group's links can take in."""
    return LINKS_MAX * 1e3 / load_ms if load_ms > 0 else math.inf
