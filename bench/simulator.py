"""How fast the simulator is, one core: simulated requests per second of CPU, planner in the loop; and a decision of the router.

`python bench/simulator.py [--gpus 64] [--rate RATE] [--seconds 60] [--policies ...] [--json FILE]`. CPU time, so that other work on the
machine counts less. Wanted: 5,000 requests/s at 64 GPUs; an hour of 10,000 GPUs at 1,000 requests/s within 30 minutes, for which a shorter
slice is run and scaled up (start apart from the rest, since it comes once); a decision of the router at 64 groups in 20 us, known prefixes
or not (their digests apart: they grow with the prompt).
"""

import argparse
import json
import platform
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nitsum.affinity import Affinity
from nitsum.perf.profile import Profile, load_shipped
from nitsum.pool import Pool, Tier
from nitsum.routing import GroupView, Routes, decide
from nitsum.sim import arrivals, hardware, workload
from nitsum.sim.fleet import Fleet
from nitsum.sim.policies import registry

TIERS = (Tier("strict", 500, 20, weight=2), Tier("loose", 2000, 60, default=True), Tier("batch"))
SHARES = {"strict": 0.3, "loose": 0.6, "batch": 0.1}
PROFILE = "llama-3.1-8b-instruct.h100_sxm"


def router_us(groups: int, turns: int = 20_000) -> float:
    """One request as a gateway sees it: the choice, and its own count of what it sent."""
    routes = Routes(GroupView((f"a{i // 8}", f"g{i % 8}"), 1, True, frozenset({f"t{i % 3}"}), i % 7, 0, 40) for i in range(groups))
    began = time.process_time()
    for i in range(turns):
        choice = decide(f"t{i % 3}", False, routes)
        assert choice is not None
        routes.submitted(choice.groups[0].key)
    return (time.process_time() - began) / turns * 1e6


def affinity_us(groups: int, turns: int = 20_000) -> dict[str, float]:
    """Prompts of 10,000 tokens: the digests of one, the look-up, a decision where a group with the prefix takes it and one where none does
    (their nodes are full), the record."""
    known, prompt = Affinity(b"key"), array("q", range(10_000))
    found = {"digests": _us(lambda: known.digests(prompt, ""), turns // 50)}
    blocks = known.digests(prompt, "")
    for i in range(4):
        known.ran(blocks, (f"a{2 * i + 1}", "g3"), 1)
    warm = known.warm(blocks, len(prompt))
    found["look-up"] = _us(lambda: known.warm(blocks, len(prompt)), turns)
    for name, running in (("taken", 1), ("not taken", 39)):
        view = [GroupView((f"a{i // 8}", f"g{i % 8}"), 1, True, frozenset(), running * (i // 8 % 2), 0, 40) for i in range(groups)]
        routes = Routes(view)
        found[name] = _us(lambda routes=routes: decide("t", False, routes, warm=warm), turns)  # type: ignore[misc]
    found["record"] = _us(lambda: known.ran(blocks, ("a1", "g3"), 1), turns)
    return found


def _us(what: Callable[[], object], turns: int) -> float:
    began = time.process_time()
    for _ in range(turns):
        what()
    return round((time.process_time() - began) / turns * 1e6, 2)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gpus", type=int, default=64)
    options.add_argument("--seconds", type=int, default=60)
    options.add_argument("--rate", type=float, default=0.0, help="requests/s; without: 3 a GPU")
    options.add_argument("--policies", default="plain-tp1,static-tp1,nitsum")
    options.add_argument("--json", type=Path, metavar="FILE")
    args = options.parse_args()
    profile: Profile = load_shipped(PROFILE)
    nodes = hardware.fleet(f"{max(args.gpus // 8, 1)}x{min(args.gpus, 8)}:h100_sxm", profile.model, profile.tp_sizes)
    pool = Pool("default/bench", "u", profile.model, TIERS, args.gpus)
    lengths = {"prompt": {"mean": 1000, "cv": 1}, "output": {"mean": 200, "cv": 1}}
    rate = args.rate or 3.0 * args.gpus
    streams = [
        {"tier": t, "synthetic": {"arrivals": {"gamma": {"cv": 1.5}}, **lengths}, "rate": rate * x, "max_tokens": 2048}
        for t, x in SHARES.items()
    ]
    traffic = arrivals.build(workload.parse({"duration": f"{args.seconds}s", "streams": streams}), lambda path: (), 1)
    setting = registry.Setting(pool, nodes, profile, profile)
    out: dict[str, Any] = {"python": platform.python_version(), "router_us": {str(n): round(router_us(n), 2) for n in (8, 64, 1024)}}
    print("router, one decision: " + ", ".join(f"{n} groups {us} us" for n, us in out["router_us"].items()))
    out["affinity_us"] = affinity_us(64)
    print("prefixes, 64 groups: " + ", ".join(f"{what} {us} us" for what, us in out["affinity_us"].items()))
    for name in registry.expand(args.policies, setting):
        began = time.process_time()
        fleet = Fleet(registry.build(name, setting), nodes, profile, traffic)
        seconds: list[tuple[float, float]] = []
        """(simulated, CPU), about once a simulated second."""

        def heard(second: float, seconds: list[tuple[float, float]] = seconds) -> None:
            seconds.append((second, time.process_time()))

        result = fleet.run(heard)
        ended = time.process_time()
        start, rest = seconds[0][1] - began, ended - seconds[0][1]
        # Without the end, when nothing arrives any more: an hour has it once too.
        at, cpu = next((s for s in seconds if s[0] >= args.seconds), seconds[-1])
        hour_s = ended - began + (cpu - seconds[0][1]) / (at - seconds[0][0]) * (3600 - args.seconds)
        found = {
            "requests": len(result.outcomes),
            "start_s": round(start, 2),
            "rest_s": round(rest, 2),
            "requests_per_s": round(len(result.outcomes) / (ended - began)),
            "an_hour_s": round(hour_s, 1),
        }
        out[f"{name} {args.gpus} GPUs {rate:g} requests/s {args.seconds} s"] = found
        print(f"{name}: {found}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
