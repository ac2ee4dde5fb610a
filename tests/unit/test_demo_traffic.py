from nitsum_local.demo.traffic import Stream, compare


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
