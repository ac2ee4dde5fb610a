"""OpenAI chat streams of the demo and what a client sees of each: tokens, times, text."""

import asyncio
import difflib
import random
import time
from dataclasses import dataclass, field

from openai import APIError, AsyncOpenAI

QUESTIONS = (
    "Name three colours, one sentence each.",
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a fox and a lazy dog.",
    "What is tensor parallelism? Answer simply.",
    "List five animals that live in the sea and say what they eat.",
    "How do I bake bread? Give the steps.",
    "Describe a walk through a forest in autumn.",
    "Tell me about the history of Paris.",
)

Question = tuple[str, int]
"""A prompt and the most tokens of its answer: greedy answers to the same question are the same."""


@dataclass
class Stream:
    """One request, as its client saw it. Times are time.monotonic() seconds."""

    tier: str
    prompt: str
    max_tokens: int
    started: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    error: str = ""

    @property
    def question(self) -> Question:
        return self.prompt, self.max_tokens

    def gap_ms(self, since: float, until: float) -> float:
        """The widest gap between two tokens that overlaps [since, until]; 0: the stream did not live across it."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max(((b - a) * 1e3 for a, b in pairs if a <= until and b >= since), default=0.0)

    def spans(self, since: float, until: float) -> bool:
        """Had tokens before `since` and after `until`."""
        return bool(self.times) and self.times[0] < since and self.times[-1] > until


async def run_stream(client: AsyncOpenAI, model: str, s: Stream) -> Stream:
    """Greedy, with logprobs, so that every single token can be compared."""
    s.started = time.monotonic()
    try:
        events = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": s.prompt}],
            max_tokens=s.max_tokens,
            temperature=0,
            stream=True,
            logprobs=True,
            extra_headers={"x-nitsum-tier": s.tier},
        )
        async for event in events:
            for choice in event.choices:
                if choice.delta.content:
                    s.text += choice.delta.content
                    s.times.append(time.monotonic())
                if choice.logprobs and choice.logprobs.content:
                    s.tokens += [t.token for t in choice.logprobs.content]
                s.finish = choice.finish_reason or s.finish
    except APIError as e:
        s.error = f"{type(e).__name__}: {e}"
    s.ended = time.monotonic()
    return s


@dataclass
class Load:
    """Open-loop arrivals of one tier: `rate` requests/s until told otherwise. At most `most` run at once: two cores are soon full."""

    tier: str
    rate: float
    max_tokens: int
    most: int = 8


class Traffic:
    """Sends what `loads` says, now. Bounded: each tier's arrivals beyond its cap are not sent."""

    def __init__(self, client: AsyncOpenAI, model: str, seed: int = 0) -> None:
        self.client, self.model, self.random = client, model, random.Random(seed)
        self.loads: tuple[Load, ...] = ()
        self.streams: list[Stream] = []
        self.live: dict[asyncio.Task[Stream], Stream] = {}
        self._number = 0

    async def run(self) -> None:
        """Until cancelled; then every stream still running is cancelled too."""
        due: dict[str, float] = {}
        try:
            while True:
                now = time.monotonic()
                for load in self.loads:
                    if load.rate <= 0 or now < due.get(load.tier, now):
                        continue
                    due[load.tier] = now + self.random.expovariate(load.rate)
                    if sum(s.tier == load.tier for s in self.live.values()) < load.most:
                        self._start(load)
                await asyncio.sleep(0.02)
        finally:
            for task in self.live:
                task.cancel()
            await asyncio.gather(*self.live, return_exceptions=True)

    def _start(self, load: Load) -> None:
        self._number += 1
        s = Stream(load.tier, QUESTIONS[self._number % len(QUESTIONS)], load.max_tokens)
        self.streams.append(s)
        task = asyncio.create_task(run_stream(self.client, self.model, s))
        self.live[task] = s
        task.add_done_callback(lambda t: self.live.pop(t, None))

    async def settle(self, timeout_s: float) -> None:
        """Sends nothing more and waits for what runs."""
        self.loads = ()
        if self.live:
            await asyncio.wait(list(self.live), timeout=timeout_s)


def compare(got: Stream, reference: Stream) -> tuple[int, int]:
    """(tokens missing, tokens repeated or added) against the unflipped run, by alignment."""
    missing = extra = 0
    for op, a0, a1, b0, b1 in difflib.SequenceMatcher(None, reference.tokens, got.tokens, autojunk=False).get_opcodes():
        missing += (a1 - a0) if op in ("delete", "replace") else 0
        extra += (b1 - b0) if op in ("insert", "replace") else 0
    return missing, extra
