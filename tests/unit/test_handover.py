"""What one side of a split block can take, by the attainment model of mixed groups."""

import math
from dataclasses import dataclass, replace

import pytest

from nitsum.attainment import Goal, Group, Lengths, safe
from nitsum.layout import Role
from nitsum.perf.profile import load_shipped
from nitsum.planner import handover
from nitsum.planner.capacity import Capacity, Mark
from nitsum.planner.offer import Asked, kinds, safe_in
from nitsum.planner.problem import Kind
from nitsum.planner.sharing import runs_of
from nitsum.planner.split import Split
from nitsum.pool import Tier

H100 = load_shipped("llama-3.1-8b-instruct.h100_sxm")
CHAT = Tier("chat", 1000, 7)
LONG = Mark(2500, 2.0, 200, 2.0, 1.0)
SHORT = Mark(200, 2.0, 8, 2.0, 1.0)


@dataclass(frozen=True)
class Copies:
    """Implements KvLoad."""

    ms: float | None

    def load_ms(self, tokens: int, tp_size: int) -> float | None:
        return self.ms


def asked(tier: Tier = CHAT, mark: Mark = LONG, rate: float = 50.0, load: object = H100, budget: int = 8) -> Asked:
    return Asked("p", (tier,), {tier.name: mark}, {tier.name: rate}, H100.tp_sizes, budget, 8, H100, load)  # type: ignore[arg-type]


def side(role: Role, tp: int, a: Asked) -> float:
    (found,) = safe_in(role, a, Capacity(True), tp, runs_of(a.tiers)[0], 1)
    return found.rate


def test_each_side_does_more_of_its_half_than_a_mixed_group_does_of_both() -> None:
    for tp in (2, 4):
        mixed = safe(Group(H100, tp, Lengths(2500, 0.9), Lengths(200, 0.8), governed=True, resident_tp=H100.tp_sizes), Goal(1000, 7, 0.95))
        assert side(Role.PREFILL, tp, asked()) > mixed.rate > 0
        assert side(Role.DECODE, tp, asked()) > mixed.rate


def test_prefill_is_bound_by_ttft_alone_and_decode_by_tpot_alone() -> None:
    fast, slow = replace(CHAT, tpot_ms=4.5), replace(CHAT, ttft_ms=300.0)
    assert side(Role.PREFILL, 2, asked(fast)) == side(Role.PREFILL, 2, asked())
    assert side(Role.DECODE, 2, asked(slow)) == side(Role.DECODE, 2, asked())
    assert side(Role.PREFILL, 2, asked(slow)) < side(Role.PREFILL, 2, asked())
    assert side(Role.DECODE, 2, asked(fast)) < side(Role.DECODE, 2, asked())


def test_a_hand_over_is_paid_by_tpot_so_short_outputs_cannot() -> None:
    rates = [side(Role.DECODE, 2, asked(load=Copies(ms))) for ms in (0.0, 20.0, 200.0, 2000.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1] == 0
    assert side(Role.DECODE, 2, asked(mark=replace(LONG, output=8.0))) == 0, "25 ms on seven tokens"
    assert side(Role.DECODE, 2, asked(load=Copies(None))) == 0, "KV that is not kept would be computed again"
    assert side(Role.DECODE, 2, replace(asked(), load=None)) == 0


def test_links_bound_what_comes() -> None:
    loose = Tier("bulk", 10_000, 200)
    (found,) = safe_in(Role.DECODE, asked(loose, load=Copies(100.0)), Capacity(True), 8, runs_of((loose,))[0], 1)
    assert (found.rate, found.binding) == (pytest.approx(handover.LINKS_MAX * 10), "hand-over")
    assert handover.linked(0.0) == math.inf


def test_a_block_takes_what_its_weaker_side_can() -> None:
    a = asked()
    (kind,) = kinds(a, Capacity(True), None, {Split(4, 1, 2, 2)})
    assert kind.rate("chat") == pytest.approx(
        min(4 * side(Role.PREFILL, 1, a), 2 * side(Role.DECODE, 2, a)), rel=0.35
    )  # of several: bursts spread
    assert (kind.tp_size, kind.shape, kind.label) == (8, (8, 4, 1, 2, 2), "(4xTP1 prefill + 2xTP2 decode) for chat")
    assert kind.binding[0].endswith(("of prefill", "of decode"))


def mixed(rate: float, tp: int = 2) -> tuple[Kind, ...]:
    return (Kind("p", tp, ("chat",), (rate,), ("TPOT",), (8,)),)


def test_blocks_are_offered_only_where_they_need_clearly_fewer_gpus() -> None:
    a, capacity = asked(), Capacity(True)
    offered = kinds(a, capacity, mixed(4.0), ())
    assert offered
    assert all(k.split is not None for k in offered)
    best = max(k.rate("chat") / k.tp_size for k in offered)
    assert best > 1.1 * 4.0 / 2
    assert kinds(a, capacity, mixed(2 * best / 1.05), ()) == (), "hardly fewer"
    assert kinds(replace(a, rates={"chat": 1.0}), capacity, mixed(4.0), ()) == (), "mixed groups have room"
    assert kinds(replace(a, gpus=4, budget=4), capacity, mixed(4.0), ()) != offered, "no block is wider than a node"
    assert all(k.tp_size <= 4 for k in kinds(replace(a, gpus=4), capacity, mixed(4.0), ()))
    assert kinds(asked(mark=SHORT, rate=2000.0), capacity, mixed(4.0), ()) == (), "too short to be handed over"
    assert kinds(replace(a, load=None), capacity, mixed(4.0), ()) == ()
    held = kinds(a, capacity, (Kind("p", 2, ("chat",), (0.0,), ("TPOT",), (0,)),), ())
    assert held, "what mixed groups cannot hold at all is worth any block"
