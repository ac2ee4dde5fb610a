"""Step-time models of pools, corrected by what their engines' steps take. Pure.

Every report carries the means of steps that were alike; each set is taken in once. Plans are made with a copy that does not move: it is
taken anew where what was learned since differs enough, for capacities are computed from it.
"""

from collections.abc import Iterable, Mapping

from nitsum.perf.correction import Corrected, StepTiming
from nitsum.perf.profile import Profile
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.accept import Accepted
from nitsum_operator.observe import Agent

FAR = 0.05
"""Part of a step's time by which plans' copy may be off."""


class Learning:
    """`on` False: profiles stay as they are."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._learning: dict[str, tuple[Profile, Corrected]] = {}
        """By pool."""
        self._fixed: dict[str, Corrected] = {}
        self._version = 0
        self._seen: dict[tuple[str, str], int] = {}
        """By agent and engine: the last set of steps."""

    def hear(self, agents: Iterable[Agent], accepted: Mapping[str, Accepted]) -> None:
        if not self.on:
            return
        self._learning = {p: known for p, known in self._learning.items() if p in accepted and known[0] == accepted[p].profile}
        self._fixed = {p: f for p, f in self._fixed.items() if p in self._learning}
        seen: dict[tuple[str, str], int] = {}
        for agent in agents:
            for r in agent.report.groups if agent.connected else ():
                key = agent.agent_id, r.group.engine_id
                if r.steps_serial and self._seen.get(key) != r.steps_serial and r.group.pool.name in accepted:
                    self._learn(r, accepted[r.group.pool.name])
                seen[key] = r.steps_serial
        self._seen = seen
        for pool, (_, model) in self._learning.items():
            if model.steps and (pool not in self._fixed or model.far_from(self._fixed[pool], FAR)):
                self._version += 1
                self._fixed[pool] = model.fixed(self._version)

    def _learn(self, r: agent_pb2.GroupReport, a: Accepted) -> None:
        # One that closes or comes back from a crash does not run as it will.
        if r.state != types_pb2.GROUP_STATE_OPEN or r.group.model != a.pool.model:
            return
        _, model = self._learning.setdefault(a.pool.name, (a.profile, Corrected(a.profile)))
        for s in r.steps:
            model.observe(StepTiming(r.group.tp_size, s.tokens, s.batch, s.context, s.mean_ms))

    @property
    def models(self) -> dict[str, Corrected]:
        """By pool; those without measurements are missing."""
        return dict(self._fixed)
