"""What `goodput.py` sends and to whom: mixes of recorded traces, their tiers, the models and how much of each is load 1.

Load 1 of a mix is about what `static-partition` held at 90 % on eight GPUs when the mixes were made; it does not move with the code. The
14B has the paper's 70 requests/s.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nitsum.perf.profile import Profile, load_shipped
from nitsum.pool import Pool, Tier
from nitsum.sim import arrivals, hardware, workload
from nitsum.sim.arrivals import Traffic
from nitsum.sim.policies.registry import Setting
from nitsum_cli import files

GPU = "h100_sxm"
START_S = 600
"""Where in each trace the simulated stretch begins; a seed thins or superposes it its own way."""
TRACES = {
    "azure": ("azure", "azure_llm_2023_conv.csv.gz"),
    "m-small": ("servegen", "servegen_m-small.jsonl.gz"),
    "reason": ("servegen", "servegen_deepseek-r1.jsonl.gz"),
    "mooncake": ("mooncake", "mooncake_fast25_conversation.jsonl.gz"),
}
STANDINS = {  # means and coefficients of variation of the traces: where they are missing
    "azure": {"arrivals": "poisson", "prompt": {"mean": 1187, "cv": 0.96}, "output": {"mean": 212, "cv": 0.78}},
    "m-small": {"arrivals": "poisson", "prompt": {"mean": 123, "cv": 5.8}, "output": {"mean": 31, "cv": 1.6}},
    "reason": {"arrivals": "poisson", "prompt": {"mean": 894, "cv": 3.6}, "output": {"mean": 1386, "cv": 1.5}},
    "mooncake": {"arrivals": "poisson", "prompt": {"mean": 12293, "cv": 1.3}, "output": {"mean": 345, "cv": 0.73}},
}
TIERS = {
    "fast": (500.0, 5.0),
    "strict": (500.0, 10.0),
    "loose": (2000.0, 30.0),
    "looser": (4000.0, 50.0),
    "reason": (5000.0, 25.0),
    "long": (10_000.0, 40.0),
    "bulk": (10_000.0, 100.0),
}
"""TTFT and TPOT in ms for an 8B model; larger ones have `Model.slower` times as much; `fast` has a TPOT that TP1 cannot meet."""


@dataclass(frozen=True)
class Model:
    """`rates`: requests/s of each mix at load 1 on eight GPUs."""

    name: str
    profile: str
    slower: float
    fast_ms: float
    rates: Mapping[str, float]

    def targets(self, tier: str) -> tuple[float, float]:
        """(TTFT, TPOT) in ms."""
        ttft_ms, tpot_ms = TIERS[tier]
        return ttft_ms * self.slower, self.fast_ms if tier == "fast" else tpot_ms * self.slower


@dataclass(frozen=True)
class Mix:
    """(tier, trace, part of the requests)."""

    name: str
    streams: tuple[tuple[str, str, float], ...]

    @property
    def strict(self) -> bool:
        return any(tier in ("fast", "strict") for tier, _, _ in self.streams)


MIXES = {
    m.name: m
    for m in (
        Mix("chat+agents", (("strict", "azure", 0.5), ("loose", "m-small", 0.5))),
        Mix("chat+long", (("strict", "azure", 0.9), ("long", "mooncake", 0.1))),
        Mix("chat+reason", (("strict", "azure", 0.75), ("reason", "reason", 0.25))),
        Mix("all four", (("strict", "m-small", 0.4), ("loose", "azure", 0.4), ("reason", "reason", 0.1), ("long", "mooncake", 0.1))),
        Mix("fast+bulk", (("fast", "azure", 0.25), ("bulk", "azure", 0.75))),
        Mix("fast+loose+reason", (("fast", "m-small", 0.6), ("loose", "azure", 0.3), ("reason", "reason", 0.1))),
        Mix("no strict tier", (("loose", "azure", 0.5), ("looser", "m-small", 0.5))),
    )
}


def _rates(*of_mix: float) -> dict[str, float]:
    return dict(zip(MIXES, of_mix, strict=True))


MODELS = {
    m.name: m
    for m in (
        Model("Llama-3.1-8B", f"llama-3.1-8b-instruct.{GPU}", 1.0, 5.0, _rates(175.0, 80.0, 52.0, 44.0, 150.0, 110.0, 290.0)),
        Model("Qwen3-14B", f"qwen3-14b.{GPU}", 1.5, 8.0, dict.fromkeys(MIXES, 70.0)),
        Model("Qwen3-32B", f"qwen3-32b.{GPU}", 2.0, 16.0, _rates(40.0, 9.2, 12.0, 14.0, 30.0, 34.0, 80.0)),
    )
}


def missing(folder: Path | None) -> list[str]:
    """Trace files that are not in the folder."""
    return [name for _, name in TRACES.values() if folder is None or not (folder / name).is_file()]


def setting(model: Model, mix: Mix, gpus: int) -> tuple[Setting, Profile]:
    times = load_shipped(model.profile)
    tiers = tuple(Tier(t, *model.targets(t), default=i == 0) for i, (t, _, _) in enumerate(mix.streams))
    nodes = hardware.fleet(f"{max(gpus // 8, 1)}x{min(gpus, 8)}:{GPU}", times.model, times.tp_sizes)
    return Setting(Pool("default/bench", "bench", times.model, tiers, gpus), nodes, times, times), times


def traffic(rate: float, mix: Mix, duration_s: float, seed: int, context: int, folder: Path | None) -> Traffic:
    """`folder` None: synthetic stand-ins."""
    streams = [
        {"tier": tier, "rate": rate * part}
        | ({"synthetic": STANDINS[of]} if folder is None else {"trace": dict(zip(("format", "path"), TRACES[of], strict=True))})
        for tier, of, part in mix.streams
    ]
    spec = workload.parse({"duration": f"{duration_s:g}s", "start": f"{START_S}s", "streams": streams})
    lines: Callable[[str], Iterable[str]] = lambda path: files.lines((folder or Path()) / path)  # noqa: E731
    return arrivals.build(spec, lines, seed, 1.0, context)
