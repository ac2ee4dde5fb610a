"""Nodes, groups and gateways in one event queue. The planner, router, ledger and demand estimator are those of production.

Events in order of time: an arrival, the end of an engine's work, a flip's new engines awake, a gateway's look at the nodes, a planner's
cycle, a stream that tries again. `lives` has what becomes of requests, `agents` how nodes carry out plans. After each plan and each switch
the invariants are checked (`gpus`): budget, one engine awake per GPU; at the end: every request ended exactly once, with as many tokens as
it had to make.
"""

import heapq
from collections.abc import Callable, Iterable

from nitsum.demand_estimate import DemandEstimator
from nitsum.perf import StepTimeModel
from nitsum.planner import Snapshot
from nitsum.sim.agents import Agents
from nitsum.sim.arrivals import Traffic
from nitsum.sim.clock import Clock
from nitsum.sim.demand import Foresight
from nitsum.sim.gateway import Gateway
from nitsum.sim.gpus import Gpus
from nitsum.sim.group import SimGroup
from nitsum.sim.lives import Lives
from nitsum.sim.node import SimNode
from nitsum.sim.policies import Policy
from nitsum.sim.result import Ending, Outcome, RunResult
from nitsum.sim.steptimes import QuickModel
from nitsum.topology import Node

VIEW_S = 1.0
DRAIN_S = 600.0
"""After the last arrival: what has not ended by then counts as failed."""
COUNTED_MAX = 4096
"""Streams of a fleet whose tokens are counted each second."""


class Fleet:
    def __init__(self, policy: Policy, nodes: Iterable[Node], model: StepTimeModel, traffic: Traffic, gateways: int = 2) -> None:
        self.planner = policy.planner() if policy.planner else None
        self.policy, self.pool, self.model, self.traffic = policy, policy.pool, QuickModel(model), traffic
        self.nodes = {n.agent_id: SimNode(n) for n in sorted(nodes, key=lambda n: n.agent_id)}
        tiers = tuple(t.name for t in self.pool.tiers)
        self.gateways = [Gateway(f"gateway-{i}", self.pool.name, tiers) for i in range(gateways)]
        self.estimator = DemandEstimator()
        self.foresight = Foresight(self.pool.name, tiers, traffic) if policy.foresight_s else None
        self.clock = Clock()
        self.gpus = Gpus(self.nodes.values(), self.pool.budget_gpus)
        self.lives = Lives(self.clock, policy, self.model, self.nodes, self.gateways, self.gpus)
        self.agents = Agents(self.clock, policy, self.model, self.gpus, self.lives)

    def run(self, progress: Callable[[float], None] = lambda _: None) -> RunResult:
        """`progress` hears the simulated second, about once each."""
        self._begin()
        requests, clock, lives, gpus = self.traffic.requests, self.clock, self.lives, self.gpus
        heap, pop, ended = clock.events, heapq.heappop, lives.outcomes
        i, n, last = 0, len(requests), self.traffic.duration_s + DRAIN_S
        shown = 0.0
        while len(ended) < n:
            if i < n and (not heap or requests[i].arrived <= heap[0][0]):
                clock.now = requests[i].arrived
                lives.arrive(requests[i])
                i += 1
                continue
            if not heap or heap[0][0] > last:
                break
            clock.now, _, what = pop(heap)
            if clock.now - shown >= 1:
                progress(clock.now)
                shown = clock.now
            what()
            if gpus.changed:
                gpus.record(clock.now)
        return RunResult(
            self.policy.name,
            self.traffic.duration_s,
            tuple(ended.get(r.rid) or Outcome(r.tier, r.arrived, Ending.FAILED) for r in requests),
            tuple(gpus.layouts),
            self.agents.flips,
            gpus.most,
            self.agents.retractions + sum(g.engine.retractions for g in self._groups()),
            clock.now,
            self.policy.note,
        )

    def _begin(self) -> None:
        if self.policy.first is not None:
            for agent_id, layout in sorted(self.policy.first.items()):
                self.agents.begin(self.nodes[agent_id], layout)
        if self.policy.planner is not None:
            self._cycle(0.0)
        self.gpus.check()
        self.gpus.record(self.clock.now)
        for i, gateway in enumerate(self.gateways):
            gateway.refresh()
            self.clock.at(VIEW_S * (i + 1) / (len(self.gateways) + 1), lambda g=gateway: self._look(g))  # type: ignore[misc]

    def _look(self, gateway: Gateway) -> None:
        gateway.refresh()
        self.clock.at(self.clock.now + VIEW_S, lambda: self._look(gateway))

    def _groups(self) -> Iterable[SimGroup]:
        return (g for n in self.nodes.values() for g in n.all_groups())

    # The operator

    def _cycle(self, seconds: float) -> None:
        """What the operator does each second: reports in, plan out."""
        policy, now = self.policy, self.clock.now
        assert self.planner is not None
        if seconds and self.foresight is None:
            self._count_running()
        for gateway in self.gateways:
            for w in gateway.windows(now, seconds) if seconds else ():
                self.estimator.observe(w)
        changing = (g for n in self.nodes.values() if n.wanted for g in n.all_groups())
        self.estimator.freeze(self.pool.name, now, {t for g in changing if g.closing or not g.open for t in g.tiers})
        for g in list(self._groups()):
            if g.ledger.queued_total:
                self.lives.expire(g)
        for g in list(self._groups()):
            if g.ledger.onward is not None and g.open:
                self.lives.started(g, g.ledger.start())
        demand = self.foresight(now, policy.foresight_s) if self.foresight else self.estimator.estimate(now)
        name, views = self.pool.name, tuple(n.view(now) for n in self.nodes.values())
        taken = Snapshot((self.pool,), views, demand, {name: self.model}, {name: policy.flip_cost}, policy.settings)
        for wanted in self.planner(taken, now).nodes:
            self.agents.apply(self.nodes[wanted.agent_id], wanted)
        self.gpus.check()
        self.clock.at(now + policy.interval_s, lambda: self._cycle(policy.interval_s))

    def _count_running(self) -> None:
        """What each stream has made by now, as gateways know; of very many, one in so many stands for all."""
        of = 1 + sum(len(g.lives) for g in self._groups()) // COUNTED_MAX
        for g in self._groups():
            for rid, made in g.engine.made_at(self.clock.now):
                if rid % of == 0 and made > 0:
                    live = g.lives[str(rid)]
                    self.gateways[live.gateway].runs(live.request.tier, made, of)
