"""What the governor's hooks do to a scheduler, step by step. Real ones are in tests/engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from nitsum_sglang.plugins import governor


class Scheduler(SimpleNamespace):
    """The parts of SGLang's that the hooks touch. `mixing` False: it refuses to mix, as with logprobs."""

    def __init__(self, mixing: bool = True, **fields: Any) -> None:
        given = {"chunked_prefill_size": 4096, "is_mixed_chunk": True, "page_size": 16, "truncation_align_size": None}
        super().__init__(mixing=mixing, deferred=False, **given | fields)
        governor._start_ungoverned(lambda self: None, self)
        assert not self.is_mixed_chunk

    def set(self, budget: int) -> None:
        request = SimpleNamespace(server_args={governor.KNOB: budget})
        assert governor._set_budget(lambda self, request: pytest.fail("not stock's"), self, request) is None

    def step(self, decodes: int, waiting: bool = True) -> tuple[int, bool] | None:
        """(prefill tokens that it may take, decodes along with them), None: a step of decodes alone."""
        running = SimpleNamespace(batch_size=lambda: decodes)
        if governor._take_turns(lambda self, running: self.deferred, self, running):
            return None
        seen: list[tuple[int, bool]] = []

        def prefill(self: Any, running: Any) -> Any:
            mixed = self.is_mixed_chunk and self.mixing and decodes > 0
            seen.append((self.chunked_prefill_size - (decodes if self.is_mixed_chunk else 0), mixed))
            return SimpleNamespace(batch_to_run=SimpleNamespace(decoding_reqs=["r"] if mixed else None) if waiting else None)

        governor._bound(prefill, self, running)
        assert (self.chunked_prefill_size, self.is_mixed_chunk) == (4096, False), "set for one step only"
        return seen[0]


def test_a_budget_mixes_and_without_one_or_decodes_all_is_stock() -> None:
    s = Scheduler()
    assert [s.step(3), s.step(3)] == [(4096, False)] * 2
    s.set(100)
    assert [s.step(3), s.step(3), s.step(0), s.step(3)] == [(96, True), (96, True), (4096, False), (96, True)]
    s.set(0)
    assert s.step(3) == (4096, False)


@pytest.mark.parametrize("fields", [{"mixing": False}, {"is_mixed_chunk": False}], ids=["refused", "not started with it"])
def test_what_does_not_mix_takes_turns(fields: dict[str, bool]) -> None:
    s = Scheduler(**fields)
    s.set(100)
    assert [s.step(3) for _ in range(5)] == [(96, False), None, (96, False), None, (96, False)]
    assert s.step(0) == (4096, False), "nothing waits any more"
    assert [s.step(3, waiting=False) for _ in range(2)] == [(96, False)] * 2, "no prefill, no turn to give back"


def test_chunks_end_where_the_engine_wants_and_stock_may_still_defer() -> None:
    s = Scheduler(truncation_align_size=40)
    s.set(100)
    assert s.step(3) == (80, True)
    s.set(1)
    assert s.step(3) == (80, True), "one chunk is the least: of a smaller one nothing would be left"
    s.deferred = True
    assert s.step(3) is None
    s = Scheduler(chunked_prefill_size=None)
    s.set(100)
    assert governor._room(s, 3) is None, "an engine that must not cut prompts"


def test_other_settings_are_stocks() -> None:
    request = SimpleNamespace(server_args={"pp_max_micro_batch_size": 2})
    assert governor._set_budget(lambda self, request: "stock", Scheduler(), request) == "stock"
