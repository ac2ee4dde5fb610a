"""How fast the simulator is: requests per second of one core, by policy and fleet. `python bench/simulator.py [--gpus 64]`."""

import argparse
import time

from nitsum.perf.profile import Profile, load_shipped
from nitsum.pool import Pool, Tier
from nitsum.sim import arrivals, hardware, workload
from nitsum.sim.fleet import Fleet
from nitsum.sim.policies import registry

TIERS = (Tier("strict", 20_000, 200, weight=2), Tier("loose", 60_000, 400, default=True), Tier("batch"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gpus", type=int, default=64)
    options.add_argument("--seconds", type=int, default=600)
    options.add_argument("--policies", default="plain-tp1,static-tp1,resplit-tp1")
    options.add_argument("--rate-per-gpu", type=float, default=0.4)
    args = options.parse_args()
    profile: Profile = load_shipped("tiny-llama.slot")
    nodes = hardware.fleet(f"{max(args.gpus // 8, 1)}x{min(args.gpus, 8)}:slot", "tiny-llama", profile.tp_sizes)
    pool = Pool("default/bench", "u", "tiny-llama", TIERS, args.gpus)
    lengths = {"prompt": {"mean": 200, "cv": 1}, "output": {"mean": 60, "cv": 1}}
    shares = {"strict": 0.3, "loose": 0.6, "batch": 0.1}
    streams = [
        {"tier": t, "synthetic": {"arrivals": {"gamma": {"cv": 1.5}}, **lengths}, "rate": args.rate_per_gpu * args.gpus * x}
        for t, x in shares.items()
    ]
    traffic = arrivals.build(workload.parse({"duration": f"{args.seconds}s", "streams": streams}), lambda path: (), 1)
    setting = registry.Setting(pool, nodes, profile, profile)
    for name in registry.expand(args.policies, setting):
        fleet, began = Fleet(registry.build(name, setting), nodes, profile, traffic), time.process_time()
        result = fleet.run()
        took = time.process_time() - began
        print(f"{name}: {len(result.outcomes)} requests in {took:.1f} s of one core: {len(result.outcomes) / took:.0f} requests/s")


if __name__ == "__main__":
    main()
