"""Safe rates of groups among which routers spread what comes, against our router and simulated engines."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from nitsum.attainment import MARGIN, Goal, Group, Lengths, safe
from nitsum.perf.profile import Profile, load_shipped
from nitsum.pool import Pool, Tier
from nitsum.sim import arrivals, compare, hardware, workload
from nitsum.sim.policies.registry import Setting

GPU = "h100_sxm"
SHORT, LONG = "llama-3.1-8b-instruct", "qwen3-32b"


@dataclass(frozen=True)
class Case:
    """`prompt` and `output`: (mean, cv). `groups` of TP `tp_size` share Poisson arrivals."""

    model: str
    tp_size: int
    groups: int
    prompt: tuple[float, float]
    output: tuple[float, float]
    ttft_ms: float
    tpot_ms: float


def profile(c: Case) -> Profile:
    return load_shipped(f"{c.model}.{GPU}")


def safe_rate(c: Case) -> float:
    group = Group(profile(c), c.tp_size, Lengths(*c.prompt), Lengths(*c.output), governed=True, resident_tp=(c.tp_size,), crowd=c.groups)
    return safe(group, Goal(c.ttft_ms, c.tpot_ms, 0.95)).rate


def attained(c: Case, rate: float, duration_s: float = 300.0) -> float:
    """`rate` in requests/s of each group."""
    times = profile(c)
    lengths = {"prompt": dict(zip(("mean", "cv"), c.prompt, strict=True)), "output": dict(zip(("mean", "cv"), c.output, strict=True))}
    stream = {"tier": "chat", "rate": rate * c.groups, "synthetic": {"arrivals": "poisson"} | lengths}
    sent = arrivals.build(workload.parse({"duration": f"{duration_s:g}s", "streams": [stream]}), lambda _: (), 1, 1.0, times.context_length)
    tier = Tier("chat", c.ttft_ms, c.tpot_ms, default=True)
    gpus = c.groups * c.tp_size
    nodes = hardware.fleet(f"1x{gpus}:{GPU}", times.model, times.tp_sizes)
    setting = Setting(Pool("default/p", "p", times.model, (tier,), gpus), nodes, times, times)
    name = f"static-tp{c.tp_size}"
    return float(compare.run((name,), setting, sent).figures()[name]["attainment"])


def cases() -> Iterator[Case]:
    for groups in (1, 2, 4):
        yield Case(SHORT, 1, groups, (1187, 0.96), (212, 0.78), 500, 10)
        yield Case(LONG, 2, groups, (1187, 0.96), (212, 0.78), 1000, 20)
        yield Case(SHORT, 1, groups, (12_000, 1.3), (345, 0.7), 10_000, 40)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_what_groups_share_is_safe_and_not_far_too_low(case: Case) -> None:
    """At the rate said most meet their targets; at twice that rate, clearly fewer than asked do."""
    rate = safe_rate(case)
    assert attained(case, rate) >= 0.88
    assert attained(case, 2 * rate) < 0.95


def test_more_groups_share_better_but_not_as_one() -> None:
    one, two, four = (safe_rate(replace(next(cases()), groups=n)) for n in (1, 2, 4))
    assert one <= two <= four < 2 * one


if __name__ == "__main__":
    for case in cases():
        rate = safe_rate(case)
        shares = {part: round(attained(case, part * rate / MARGIN), 3) for part in (0.8, 0.9, 1.0, 1.2)}
        print(json.dumps({"case": str(case), "rate": round(rate, 2), "attained": shares}), flush=True)
