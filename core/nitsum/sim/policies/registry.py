"""Policies by the names that `--policy` takes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from nitsum.errors import InvalidSpec
from nitsum.layout import FlipMode
from nitsum.perf import FlipCost, KvLoad, StepTimeModel
from nitsum.perf.memory import worth_residing
from nitsum.planner import Plan, Planner, PlannerSettings, Snapshot
from nitsum.planner.planes import Planes
from nitsum.pool import AdaptationMode, Pool
from nitsum.quantity import duration_ms
from nitsum.sim.policies import Policy, governed, replicas
from nitsum.sim.policies.layouts import uniform
from nitsum.sim.policies.standing import Standing
from nitsum.topology import Node

NAMES = (
    *("plain-tpN", "aware-tpN", "apart", "static-tpN", "static-partition", "static-pd", "resplit-tpN"),
    *("replicas", "replicas-tpN", "restart-tp", "nitsum", "nitsum@FLIP", "oracle"),
)
"""FLIP: what a flip costs: free, copy, recompute (as `nitsum` itself), or a pause like 30s."""
SEARCHED = ("static-partition", "apart", "static-pd", replicas.NAME, "oracle")
"""Made from the traffic they will see."""
RESTART_S = 30.0


@dataclass(frozen=True)
class FixedPause:
    """Implements FlipCost: whatever moves, the pause is the same, and KV is lost. And KvLoad: as `load`, where roles hand over."""

    ms: float
    load: KvLoad | None = None

    def load_ms(self, tokens: int, tp_size: int) -> float | None:
        return self.load.load_ms(tokens, tp_size) if self.load is not None else None

    def pause_ms(self, resident_tokens: int, mode: FlipMode, from_tp: int, to_tp: int) -> float:
        return self.ms


@dataclass(frozen=True)
class Setting:
    """What every policy of a comparison shares."""

    pool: Pool
    nodes: tuple[Node, ...]
    model: StepTimeModel
    flip_cost: FlipCost
    planner: Callable[[], Planner] = Planes
    settings: PlannerSettings = PlannerSettings()

    @property
    def tps(self) -> tuple[int, ...]:
        """Degrees that the spec, the profile and the nodes allow."""
        widest = max(len(n.gpus) for n in self.nodes)
        legal = set.intersection(*(set(n.legal_tp.get(self.pool.model, ())) for n in self.nodes))
        allowed = self.pool.allowed_tp or self.model.tp_sizes
        return tuple(t for t in self.model.tp_sizes if t in allowed and t <= min(widest, self.pool.budget_gpus) and t in legal)

    @property
    def kv_load(self) -> KvLoad | None:
        """What planners count on where roles hand over."""
        return self.flip_cost if isinstance(self.flip_cost, KvLoad) else None

    @property
    def resident_tp(self) -> tuple[int, ...]:
        """Those that our planner keeps resident."""
        return worth_residing(self.model, self.tps)


def _fixed(s: Setting, tp_size: int, mode: AdaptationMode) -> Pool:
    return replace(s.pool, allowed_tp=(tp_size,), mode=mode)


def _plain(s: Setting, name: str, tp_size: int) -> Policy:
    return Policy(name, s.pool, s.flip_cost, (tp_size,), None, uniform(s.pool, s.nodes, tp_size, f"policy {name}"))


def _static(s: Setting, name: str, tp_size: int) -> Policy:
    first = uniform(s.pool, s.nodes, tp_size, f"policy {name}")
    return Policy(name, _fixed(s, tp_size, AdaptationMode.FROZEN), s.flip_cost, (tp_size,), Standing, first, s.settings)


def _resplit(s: Setting, name: str, tp_size: int) -> Policy:
    first = uniform(s.pool, s.nodes, tp_size, f"policy {name}")
    pool = _fixed(s, tp_size, AdaptationMode.ACTIVE)
    return Policy(name, pool, s.flip_cost, (tp_size,), s.planner, first, s.settings, kv_load=s.kv_load)


def _replicas(s: Setting, name: str, tp_size: int) -> Policy:
    first = replicas.first(s.pool, s.nodes, tp_size, f"policy {name}")
    planner = lambda: replicas.Replicas(s.pool, s.nodes, tp_size)  # noqa: E731
    pool, note = _fixed(s, tp_size, AdaptationMode.ACTIVE), f"a replica of another tier takes {RESTART_S:g} s to start"
    return Policy(name, pool, FixedPause(RESTART_S * 1e3), (tp_size,), planner, first, s.settings, note=note)


def _nitsum(s: Setting, name: str) -> Policy:
    pool = replace(s.pool, mode=AdaptationMode.ACTIVE)
    return Policy(name, pool, s.flip_cost, s.resident_tp, s.planner, None, s.settings, kv_load=s.kv_load)


def _nitsum_at(s: Setting, name: str, flip: str) -> Policy:
    """`nitsum` where a flip costs something else; the planner knows it."""
    policy = _nitsum(s, name)
    if flip == "recompute":
        return policy
    if flip == "copy":
        return replace(policy, planner=keeping(s.planner))
    if flip == "free":
        return replace(policy, planner=keeping(s.planner), flip_cost=FixedPause(0.0, policy.kv_load))
    return replace(policy, flip_cost=FixedPause(duration_ms(flip, f"policy {name}"), policy.kv_load))


def _restart(s: Setting, name: str) -> Policy:
    """The same planner, told what a restart costs; one TP's engines at a time, so the whole memory is theirs."""
    pool = replace(s.pool, mode=AdaptationMode.ACTIVE)
    return Policy(name, pool, FixedPause(RESTART_S * 1e3), (), s.planner, None, s.settings, note=f"a change of TP takes {RESTART_S:g} s")


def keeping(made: Callable[[], Planner]) -> Callable[[], Planner]:
    """Planners whose flips carry the KV along."""

    def make() -> Planner:
        planner = made()

        def planned(snapshot: Snapshot, now: float) -> Plan:
            found = planner(snapshot, now)
            return replace(found, nodes=tuple(replace(n, mode=FlipMode.MIGRATE_FIRST) for n in found.nodes))

        return planned

    return make


SIMPLE: dict[str, Callable[[Setting, str], Policy]] = {"nitsum": _nitsum, "restart-tp": _restart}
BY_TP: dict[str, Callable[[Setting, str, int], Policy]] = {
    "plain": _plain,
    "aware": _static,
    "static": _static,
    "resplit": _resplit,
    "replicas": _replicas,
}
STOCK = ("plain", "aware", "apart")
"""Engines without our governor: the lower rungs of the paper's ladder."""


def expand(text: str, s: Setting) -> tuple[str, ...]:
    """`nitsum,static-tpN` -> names, N standing for every legal TP. Raises InvalidSpec."""
    found: list[str] = []
    for name in (n.strip() for n in text.split(",")):
        if name.endswith("-tpN"):
            found += [f"{name[:-1]}{tp}" for tp in s.tps]
        elif name:
            found.append(name)
    if not found:
        raise InvalidSpec("policy", f"names no policy; there are {', '.join(NAMES)}")
    return tuple(dict.fromkeys(found))


def with_engines(policy: Policy) -> Policy:
    """With our governor in its engines, unless it is one of STOCK."""
    return policy if policy.name.partition("-")[0] in STOCK else replace(policy, limits=governed)


def build(name: str, s: Setting) -> Policy:
    """Raises InvalidSpec."""
    if name in SIMPLE:
        return with_engines(SIMPLE[name](s, name))
    if name.startswith("nitsum@"):
        return with_engines(_nitsum_at(s, name, name.removeprefix("nitsum@")))
    match = re.fullmatch(r"([a-z]+)-tp([0-9]+)", name)
    if match is None or match[1] not in BY_TP:
        raise InvalidSpec("policy", f"no policy {name!r}; there are {', '.join(NAMES)}")
    if int(match[2]) not in s.tps:
        raise InvalidSpec(f"policy {name}", f"TP {match[2]} is not legal here; legal are {', '.join(map(str, s.tps))}")
    return with_engines(BY_TP[match[1]](s, name, int(match[2])))


def check(names: tuple[str, ...], s: Setting) -> None:
    """Raises InvalidSpec for the first that cannot be built; reads no traffic."""
    for name in names:
        if name not in SEARCHED:
            build(name, s)
        elif name == replicas.NAME:
            replicas.degrees(s.pool, s.nodes, s.tps, f"policy {name}")
