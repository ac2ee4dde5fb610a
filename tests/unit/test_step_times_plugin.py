"""What the step-time hooks make of SGLang's batches. Real ones are in tests/engine."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from nitsum_sglang import seam, wire
from nitsum_sglang.plugins import step_times


class Lengths(list[int]):
    """A tensor as far as it is used."""

    def sum(self) -> int:
        return sum(self)


def mode(name: str) -> Any:
    return SimpleNamespace(
        is_decode=lambda: name == "decode", is_extend=lambda: name in ("extend", "mixed"), is_mixed=lambda: name == "mixed"
    )


def decode(*contexts: int) -> Any:
    return SimpleNamespace(forward_mode=mode("decode"), seq_lens_cpu=Lengths(contexts), launch_ts=time.monotonic())


def prefill(chunks: list[int], cached: list[int], decoding: int = 0) -> Any:
    name = "mixed" if decoding else "extend"
    given = {"extend_lens": chunks, "prefix_lens": cached, "decoding_reqs": ["r"] * decoding or None}
    return SimpleNamespace(forward_mode=mode(name), launch_ts=time.monotonic(), **given)


class Scheduler(SimpleNamespace):
    """The parts that the hooks touch. `answers`: False for a rank that has nobody to tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: bool = True) -> None:
        socket = object() if answers else None
        super().__init__(ipc_channels=SimpleNamespace(send_to_tokenizer=SimpleNamespace(socket=socket)))
        self.told: list[str] = []
        monkeypatch.setattr(step_times, "_tell", lambda scheduler, message: scheduler.told.append(message))

    def step(self, batch: Any, ms: float) -> None:
        batch.launch_ts = time.monotonic() - ms / 1e3
        assert step_times._ended(lambda self, batch, result: "stock's", self, batch, None) == "stock's"


def test_steps_alike_count_as_one_and_a_message_comes_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Scheduler(monkeypatch)
    s.step(decode(100, 120), 10)
    s.step(decode(101, 121), 20)
    s.step(prefill([32, 16], [0, 16]), 5)
    s.step(prefill([64, 1, 1], [0, 200, 220], decoding=2), 30)
    assert not s.told, "a second is not over"
    s.nitsum_window.began -= step_times.WINDOW_S
    s.step(decode(102, 122), 30)
    (message,) = s.told
    got = {t.phase: t for t in wire.timings_of(message)}
    assert (got["decode"].batch, got["decode"].tokens, got["decode"].context, got["decode"].count) == (2, 0, 111, 3)
    assert got["decode"].mean_ms == pytest.approx(20, abs=2)
    assert (got["prefill"].batch, got["prefill"].tokens, got["prefill"].context) == (0, 48, 8)
    assert (got["mixed"].batch, got["mixed"].tokens, got["mixed"].context) == (2, 64, 210)
    s.step(decode(10), 1)
    assert len(s.told) == 1, "a new window"


def test_a_message_has_the_commonest_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    window = step_times.Window()
    for i in range(40):
        for _ in range(1 + i):
            window.add("decode", 1 << (i % 8), 0, 1 << i, 1.0)
    rows = json.loads(window.message())
    assert len(rows) == step_times.KINDS_MAX
    assert min(row[-1] for row in rows) > 20


def test_other_ranks_say_nothing_and_a_park_forgets_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Scheduler(monkeypatch, answers=False)
    silent.step(decode(5), 1)
    assert not hasattr(silent, "nitsum_window")
    s = Scheduler(monkeypatch)
    s.step(decode(5), 500)
    assert step_times._parked(lambda self, request: "parked", s, None) == "parked"
    assert not s.nitsum_window.sums
    idle = SimpleNamespace(forward_mode=mode("idle"), launch_ts=time.monotonic())
    s.step(idle, 1)
    assert not s.nitsum_window.sums


def test_the_rid_is_no_clients() -> None:
    assert seam.STEPS.count(".") == 1, "clients' rids have a number before the dot"
