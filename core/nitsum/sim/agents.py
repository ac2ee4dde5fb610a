"""Carries out plans on simulated nodes, as agents and hosts do: new capacities at once, new groups by a flip."""

import math
from dataclasses import replace
from functools import partial

from nitsum.layout import FlipMode, Group, Layout, Role
from nitsum.ledger import Ledger
from nitsum.planner import NodePlan
from nitsum.sim.clock import Clock
from nitsum.sim.engine import NEVER, Engine, EngineLimits
from nitsum.sim.gpus import Gpus
from nitsum.sim.group import SimGroup
from nitsum.sim.lives import Lives
from nitsum.sim.node import SimNode
from nitsum.sim.policies import Policy
from nitsum.sim.steptimes import QuickModel


class Agents:
    def __init__(self, clock: Clock, policy: Policy, model: QuickModel, gpus: Gpus, lives: Lives) -> None:
        self.clock, self.policy, self.model, self.gpus, self.lives = clock, policy, model, gpus, lives
        self.flips = 0
        self.retractions = 0
        """Of engines that have gone to sleep."""

    def begin(self, n: SimNode, layout: Layout) -> None:
        """Nothing is given up: engines wake where none ran."""
        n.layout = layout
        for group in layout.groups:
            self.wake(n, group)
        self._link(n)

    def apply(self, n: SimNode, wanted: NodePlan) -> None:
        if n.wanted is not None or wanted.layout is n.layout:
            return  # one flip at a time on a node; or no news
        n.residency, n.layout = wanted.residency, wanted.layout
        new = {g.group_id: g for g in wanted.layout.groups}
        kept = {i: g for i, g in n.groups.items() if i in new and new[i].gpu_uuids == g.group.gpu_uuids}
        for i, g in kept.items():
            if new[i] != g.group:
                seen = g.tiers, g.group.capacity.max_running
                g.serve(new[i], g.engine.kv_tokens)
                g.engine.limits = self._limits(n, new[i])
                started = g.ledger.start()
                self.lives.started(g, started)
                if g.tiers != seen[0]:
                    self.gpus.changed = True
                if started or seen != (g.tiers, g.group.capacity.max_running):
                    self.lives.news(g)
        if len(kept) == len(new) == len(n.groups):
            return self._link(n)
        if not n.groups:
            return self.begin(n, wanted.layout)
        self._flip(n, wanted, [g for i, g in n.groups.items() if i not in kept])

    def _limits(self, n: SimNode, group: Group) -> EngineLimits:
        return replace(self.policy.limits(group), hands_over=bool(n.layout.hands_over(group)))

    def _link(self, n: SimNode) -> None:
        """Ledgers that hand over look at those that take in."""
        prefill, decode = (tuple(g.ledger for g in n.groups.values() if g.group.role is role) for role in (Role.PREFILL, Role.DECODE))
        news = n.onward.link(prefill, decode)
        for g in list(n.groups.values()):
            if g.ledger in news and g.open:
                self.lives.started(g, g.ledger.start())

    # A flip, from layout A to B

    def _flip(self, n: SimNode, wanted: NodePlan, ended: list[SimGroup]) -> None:
        """A's groups close; B's gather what comes from now on and open when A's engines have stopped and the pause is over."""
        self.flips += 1
        n.wanted, n.epoch = wanted, n.epoch + 1
        for g in ended:
            g.closing = True
            g.engine.limits = replace(g.engine.limits, hands_over=False)  # what it lets finish ends there
            n.groups.pop(g.group.group_id)
            n.ending[g.group.group_id] = g
            self.lives.news(g)
        for group in wanted.layout.groups:
            if group.group_id not in n.groups:
                self._place(n, group)
        self._link(n)
        n.draining = [g for g in ended if g.lives] if wanted.mode is FlipMode.LET_FINISH else []
        for g in list(n.draining):
            for e in g.ledger.empty_queues():
                self.lives.moved(n, g, g.lives.pop(e.rid))
            if g.lives:
                g.drained = partial(self._drained, n, g)
            else:
                n.draining.remove(g)
        if not n.draining:
            self._switch(n)
        elif wanted.let_finish_s < math.inf:
            self.clock.at(self.clock.now + wanted.let_finish_s, lambda: self._waited(n, wanted))

    def _waited(self, n: SimNode, wanted: NodePlan) -> None:
        """LET_FINISH waits no longer."""
        if n.wanted is wanted and n.draining:
            n.draining = []
            self._switch(n)

    def _drained(self, n: SimNode, g: SimGroup) -> None:
        if g in n.draining:
            n.draining.remove(g)
            if not n.draining:
                self._switch(n)

    def _switch(self, n: SimNode) -> None:
        """A's engines stop, B's wake after the pause; streams go to B at once and wait there."""
        assert n.wanted is not None
        kept, ended = n.wanted.mode is FlipMode.MIGRATE_FIRST, list(n.ending.values())
        to_tp = max((g.group.tp_size for g in n.groups.values() if not g.open), default=1)
        # KV that is computed again costs its prefill in the engine, below; only what is copied is part of the pause.
        cost, now = self.policy.flip_cost, self.clock.now
        pauses = [cost.pause_ms(g.engine.resident_at(now) if kept else 0, n.wanted.mode, g.group.tp_size, to_tp) for g in ended]
        pause_s = max(pauses, default=0.0) / 1e3
        gone = []
        for g in ended:
            gone += [(g, live) for live in self.lives.stop(g, kept)]
            self._sleep(n, g)
        for g, live in gone:
            self.lives.moved(n, g, live)
        self.gpus.check()
        if pause_s > 0:
            self.clock.at(now + pause_s, lambda: self._opened(n))
        else:
            self._opened(n)

    def _opened(self, n: SimNode) -> None:
        n.wanted, n.flipped_at = None, self.clock.now
        for g in list(n.groups.values()):
            if not g.open:
                self._open(g)

    # Engines

    def wake(self, n: SimNode, group: Group) -> None:
        self._open(self._place(n, group))

    def _place(self, n: SimNode, group: Group) -> SimGroup:
        kv = self.model.kv_capacity_tokens(group.tp_size, self.policy.resident_tp)
        engine = Engine(self.model.times[group.tp_size], kv, self._limits(n, group))
        g = SimGroup((n.node.agent_id, group.group_id), group, n.epoch, engine, Ledger(group.capacity, group.shares, engine.kv_tokens))
        g.serve(group, engine.kv_tokens if self.policy.planner else 0)
        n.groups[group.group_id] = g
        self.lives.news(g)
        self.gpus.changed = True
        return g

    def _open(self, g: SimGroup) -> None:
        self.gpus.wake(g)
        self.lives.let_in(g)

    def _sleep(self, n: SimNode, g: SimGroup) -> None:
        assert g.engine.next_at == NEVER, "an engine sleeps at work"
        self.gpus.sleep(g)
        self.retractions += g.engine.retractions
        del n.ending[g.group.group_id]
