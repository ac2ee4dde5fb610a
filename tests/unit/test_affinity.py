"""What is kept of prompts: enough to find their beginnings again, never more than the bound."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.affinity import BLOCK, PLACES_MAX, PROMPT_BLOCKS_MAX, WARM_MAX, Affinity

KEY = b"secret"
A, B, C = (("node", g) for g in "abc")
PROMPT = list(range(10 * BLOCK))


def shared(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> list[bool]:
    return [x == y for x, y in zip(one, other, strict=True)]


def test_digests_cover_all_that_comes_before_and_the_salt() -> None:
    made = Affinity(KEY).digests(PROMPT, "")
    assert len(made) == 10 == len(set(made))
    assert made == Affinity(KEY).digests(array("q", PROMPT), "") == Affinity(KEY).digests(array("i", PROMPT), "")
    changed = list(PROMPT)
    changed[4 * BLOCK] = 7
    assert shared(made, Affinity(KEY).digests(changed, "")) == [True] * 4 + [False] * 6
    assert not any(shared(made, Affinity(KEY).digests(PROMPT, "acme")))
    assert not any(shared(made, Affinity(b"other").digests(PROMPT, "")))
    assert made[:3] == Affinity(KEY).digests(PROMPT[: 4 * BLOCK - 1], ""), "whole blocks alone"
    assert Affinity(KEY).digests(PROMPT[: BLOCK - 1], "") == ()


def test_a_salt_is_no_beginning_of_a_prompt() -> None:
    spelled = array("q", [0x6161616161616161] * BLOCK + PROMPT)
    assert Affinity(KEY).digests(PROMPT, "a" * 8 * BLOCK)[0] != Affinity(KEY).digests(spelled, "")[1]


def test_of_a_long_prompt_the_beginning_counts() -> None:
    prompt = array("q", range((PROMPT_BLOCKS_MAX + 5) * BLOCK))
    assert len(Affinity(KEY).digests(prompt, "")) == PROMPT_BLOCKS_MAX


def test_what_is_no_token_is_named() -> None:
    with pytest.raises(TypeError):
        Affinity(KEY).digests(["x"], "")  # type: ignore[list-item]
    with pytest.raises(OverflowError):
        Affinity(KEY).digests([1 << 64], "")


def test_the_longest_beginning_comes_first_and_of_one_length_the_last_place() -> None:
    a = Affinity(KEY)
    whole, half = a.digests(PROMPT, ""), a.digests(PROMPT[: 5 * BLOCK], "")
    assert a.warm(whole, len(PROMPT)) == ()
    a.ran(whole, A, 1)
    a.ran(half, B, 1)
    a.ran(half, C, 4)
    assert a.warm(whole, len(PROMPT)) == ((A, 1, 1.0), (C, 4, 0.5), (B, 1, 0.5))
    assert a.warm(half, 10 * BLOCK) == ((C, 4, 0.5), (B, 1, 0.5), (A, 1, 0.5)), "the rest of that prompt is not known anywhere"
    a.ran(whole, A, 2)
    assert a.warm(whole, len(PROMPT))[0] == (A, 2, 1.0), "an epoch that is over has no KV"
    assert [w.key for w in a.warm(whole, len(PROMPT))].count(A) == 1


def test_the_ends_of_prompts_are_forgotten_before_their_beginnings() -> None:
    a = Affinity(KEY, blocks_max=12)
    old, new = a.digests(PROMPT, ""), a.digests(PROMPT[::-1], "")
    a.ran(old, A, 1)
    a.ran(new[:8], B, 1)
    assert len(a) == 12
    assert a.warm(old, len(PROMPT)) == ((A, 1, 0.4),)
    assert a.warm(new, len(PROMPT)) == ((B, 1, 0.8),)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10), st.integers(0, 6), st.integers(1, 3)), max_size=40), st.integers(1, 20))
def test_memory_is_bounded_whatever_comes(story: list[tuple[int, int, int, int]], most: int) -> None:
    a = Affinity(KEY, blocks_max=most)
    prompts = [a.digests([i, *PROMPT[1:]], "") for i in range(6)]
    last: tuple[tuple[bytes, ...], tuple[str, str], int] | None = None
    for i, blocks, group, epoch in story:
        last = prompts[i][:blocks], ("node", f"g{group}"), epoch
        a.ran(*last)
        assert len(a) <= most
        assert all(len(places) <= PLACES_MAX for places in a._places.values())
        for prompt in prompts:
            found = a.warm(prompt, len(PROMPT))
            assert len(found) <= WARM_MAX
            assert [w.share for w in found] == sorted((w.share for w in found), reverse=True)
            assert all(0 < w.share <= 1 for w in found)
    if last is not None and len(last[0]) <= most:
        assert a.warm(last[0], len(last[0]) * BLOCK)[0] == (last[1], last[2], 1.0)
