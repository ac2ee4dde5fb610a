"""Split blocks: how a node's GPUs divide, and how its groups tell."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.layout import Group, Role
from nitsum.planner.split import SIZES, Split, divisions, read
from nitsum.topology import Gpu, Node

TPS = (1, 2, 4, 8)


def node(gpus: int = 8, per_island: int = 8) -> Node:
    return Node("a", tuple(Gpu(i, f"g{i}", island=i // per_island) for i in range(gpus)))


def group(first: int, tp: int, role: Role) -> Group:
    return Group(f"tp{tp}-{first}", f"tp{tp}-{first}", "p", "m", tp, tuple(f"g{i}" for i in range(first, first + tp)), role)


def placed(split: Split, first: int) -> list[Group]:
    gpus = [Gpu(i, f"g{i}") for i in range(first, first + split.gpus)]
    return [group(part[0].index, len(part), role) for role, part in split.over(gpus)]


def test_every_division_fills_its_block_with_aligned_groups_of_both_roles() -> None:
    for size in SIZES:
        found = divisions(size, TPS)
        assert len(set(found)) == len(found)
        for split in found:
            assert split.gpus == size
            assert min(split.prefill, split.decode) >= 1
            for first in range(0, 8, size):
                assert all(int(g.gpu_uuids[0][1:]) % g.tp_size == 0 for g in placed(split, first)), split
    assert divisions(2, TPS) == (Split(1, 1, 1, 1),)
    assert Split(4, 1, 1, 4) in divisions(8, TPS)
    assert divisions(8, (8,)) == ()
    assert not any(3 in (s.prefill_tp, s.decode_tp) and s.prefill_tp != s.decode_tp for s in divisions(8, (2, 3))), "3 on 2 is not aligned"


@st.composite
def blocks(draw: st.DrawFn) -> list[tuple[int, Split | None]]:
    """(first GPU, its block or none), packed as the planner packs: widest first."""
    sizes = draw(st.sampled_from([(8,), (4, 4), (4, 2, 2), (2, 2, 2, 2)]))
    found, first = [], 0
    for size in sizes:
        found.append((first, draw(st.one_of(st.none(), st.sampled_from(divisions(size, TPS))))))
        first += size
    return found


@settings(max_examples=200, deadline=None)
@given(blocks(), st.permutations(range(8)))
def test_a_node_tells_the_blocks_that_were_placed_on_it(wanted: list[tuple[int, Split | None]], order: list[int]) -> None:
    groups = [g for first, split in wanted if split is not None for g in placed(split, first)]
    shuffled = [groups[i] for i in order if i < len(groups)] + groups[8:]
    found = {int(members[0].gpu_uuids[0][1:]): split for split, members in read(node(), shuffled)}
    assert found == {first: split for first, split in wanted if split is not None}
    for split, members in read(node(), shuffled):
        assert [(g.role, g.tp_size) for g in members] == list(split.parts())


def test_what_has_lost_its_partners_is_in_no_block() -> None:
    whole = placed(Split(1, 1, 3, 1), 0)
    assert [split for split, _ in read(node(), whole)] == [Split(1, 1, 3, 1)]
    assert read(node(), whole[:1]) == [], "a lone prefill group"
    assert read(node(), whole[1:]) == [], "no prefill group"
    assert [(s, len(m)) for s, m in read(node(), whole[:3])] == [(Split(1, 1, 1, 1), 2)], "the pair that is whole goes on"
    mixed = [*whole[:3], replace(whole[3], role=Role.MIXED)]
    assert [s for s, _ in read(node(), mixed)] == [Split(1, 1, 1, 1)]
    assert read(node(8, 2), placed(Split(2, 1, 2, 1), 0)) == [], "islands hold a block together"


def test_a_whole_node_of_another_size_is_a_block() -> None:
    assert [s for s, _ in read(node(6), placed(Split(2, 1, 4, 1), 0))] == [Split(2, 1, 4, 1)]


def test_it_says_itself_in_plain_words() -> None:
    assert str(Split(2, 1, 1, 4)) == "2xTP1 prefill + 1xTP4 decode"
