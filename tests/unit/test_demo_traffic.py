from dataclasses import replace

from nitsum_local.demo.flips import Window, met, moved, of_pool
from nitsum_local.demo.summary import Summary, summarise
from nitsum_local.demo.traffic import Stream, compare
from nitsum_local.demo.view import lasting


def stream(*tokens: str, times: tuple[float, ...] = ()) -> Stream:
    return Stream("t", "p", 8, tokens=list(tokens), times=list(times))


def test_missing_and_repeated_tokens_are_counted() -> None:
    whole = stream("a", "b", "c", "d")
    assert compare(stream("a", "b", "c", "d"), whole) == (0, 0)
    assert compare(stream("a", "c", "d"), whole) == (1, 0)
    assert compare(stream("a", "b", "b", "c", "d"), whole) == (0, 1)


def test_the_gap_is_the_one_that_overlaps_the_flip() -> None:
    s = stream(times=(0.0, 0.1, 0.6, 0.7, 2.0))
    assert round(s.gap_ms(0.2, 0.3)) == 500
    assert s.spans(0.2, 0.3)
    assert not s.spans(0.2, 3.0)


FLIP = Window(10.0, 10.2, ("a",), ("b",))


def lived(started: float, ended: float, *times: float, tokens: str = "abcd") -> Stream:
    return Stream("t", "p", 8, started, ended, list(times), list(tokens), tokens, "stop")


ACROSS = lived(9.0, 12.0, 9.5, 10.5, 11.0, 11.5)
QUEUED = lived(9.0, 12.0, 10.5, 10.6, 10.7, 11.5)
CUT = lived(9.0, 10.1, 9.5, 9.6, tokens="ab")
BEFORE, AFTER = lived(1.0, 9.0, 2.0, 8.0), lived(10.5, 12.0, 11.0, 11.5)


def summary(*streams: Stream, reference: str = "abcd", flips: int = 1) -> Summary:
    facts = {"first_flip_after_s": 1.0, "layouts": ["3xTP1"], "profile": "modelled"}
    references = {ACROSS.question: lived(20.0, 21.0, tokens=reference)}
    return summarise(streams, moved(streams, [FLIP]), met(streams, [FLIP]), references, flips, **facts)


def test_every_stream_that_a_flip_met_is_compared_and_every_moved_one_has_a_pause() -> None:
    many = summary(*[ACROSS] * 30, QUEUED, BEFORE, AFTER)
    assert many.pause_ms == [1000.0] * 30
    assert many.streams_across_flip == 30
    assert many.streams_compared == 31
    assert many.good


def test_a_stream_that_a_flip_cut_short_is_found_though_it_has_no_pause() -> None:
    cut = summary(ACROSS, CUT)
    assert cut.tokens_missing == 2
    assert not cut.text_equal
    assert not cut.good


def test_the_demo_is_not_good_without_a_flip_or_with_a_stream_that_never_ended() -> None:
    assert not summary(ACROSS, flips=0).good
    assert not summary(BEFORE, AFTER).good
    assert not summary(ACROSS, replace(AFTER, ended=0.0)).good
    assert not summary(ACROSS, reference="abcdd").good
    assert summary(ACROSS, reference="abc").tokens_repeated == 1
    assert not summary(ACROSS, replace(AFTER, error="500")).good


def test_a_flip_of_another_pool_or_node_is_not_mixed_into_ours() -> None:
    def line(t: float, event: str, engine: str, node: int) -> dict[str, object]:
        return {"t": t, "event": event, "engine": engine, "gpus": [f"node-{node}-slot-0"], "pid": 1}

    chat = [line(5.0, "park", "default.chat-tp1-0", 0), line(5.2, "wake", "default.chat-tp3-0", 0)]
    there = [line(5.1, "park", "default.chat-tp1-1", 1), line(5.3, "wake", "default.chat-tp3-1", 1)]
    other = [line(5.05, "park", "default.tiny-tp1-0", 1), line(5.15, "wake", "default.tiny-tp2-0", 1)]
    found = of_pool(sorted([*chat, *there, *other], key=lambda x: float(str(x["t"]))), "default.chat", 0.0)
    assert [(w.start, w.end) for w in found] == [(5.0, 5.2), (5.1, 5.3)]
    assert of_pool(chat, "default.chat", 6.0) == []


def test_the_view_goes_on_showing_why_while_a_decision_is_only_held_up() -> None:
    assert lasting(["profile p", "first layout: 1 x TP3"], "") == "first layout: 1 x TP3"
    assert lasting(["profile p", "a flip is running"], "first layout: 1 x TP3") == "first layout: 1 x TP3"
    assert lasting([], "first layout: 1 x TP3") == "first layout: 1 x TP3"
