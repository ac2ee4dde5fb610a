"""Nodes, groups and gateways in one event queue. The planner, router, ledger and demand estimator are those of production.

Events in order of time: an arrival, the end of an engine's work, a flip's new engines awake, a gateway's look at the nodes, a planner's
cycle, a stream that tries again. After each plan and each switch the invariants are checked: budget, one engine awake per GPU; at the
end: every request ended exactly once, with as many tokens as it had to make.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count

from nitsum import routing
from nitsum.demand_estimate import DemandEstimator
from nitsum.layout import FlipMode, Group, Layout, Role
from nitsum.ledger import Admission, Admitted, Entry, Full, Ledger, kv_promise
from nitsum.onward import Onward
from nitsum.perf import StepTimeModel
from nitsum.planner import NodePlan, NodeView, Snapshot
from nitsum.residency import Residency
from nitsum.routing import AdmissionClass
from nitsum.sim.arrivals import Traffic
from nitsum.sim.demand import Foresight
from nitsum.sim.engine import NEVER, Engine, EngineLimits, Happened, Seq
from nitsum.sim.gateway import Gateway
from nitsum.sim.group import Key, Live, SimGroup
from nitsum.sim.policies import Policy
from nitsum.sim.request import Request
from nitsum.sim.result import Ending, LayoutAt, Outcome, RunResult
from nitsum.sim.steptimes import QuickModel
from nitsum.topology import Node

ADMISSIONS = {
    AdmissionClass.FEASIBLE: Admission.FEASIBLE,
    AdmissionClass.BEST_EFFORT: Admission.BEST_EFFORT,
    AdmissionClass.BACKGROUND: Admission.BACKGROUND,
}
QUEUE_S = 60.0
"""As the engine host's: how long a request waits in a group's queue."""
VIEW_S = 1.0
DRAIN_S = 600.0
"""After the last arrival: what has not ended by then counts as failed."""
COUNTED_MAX = 4096
"""Streams of a fleet whose tokens are counted each second."""


@dataclass(eq=False)
class _Node:
    """`wanted`: the layout that a flip under way leads to."""

    node: Node
    residency: Residency = Residency()
    groups: dict[str, SimGroup] = field(default_factory=dict)
    ending: dict[str, SimGroup] = field(default_factory=dict)
    """Closed by the flip under way; awake until their engines stop."""
    wanted: NodePlan | None = None
    draining: list[SimGroup] = field(default_factory=list)
    flipped_at: float | None = None
    epoch: int = 0
    layout: Layout = Layout()
    """What runs, or what a flip leads to."""
    onward: Onward = field(default_factory=Onward)


class Fleet:
    def __init__(self, policy: Policy, nodes: Iterable[Node], model: StepTimeModel, traffic: Traffic, gateways: int = 2) -> None:
        self.planner = policy.planner() if policy.planner else None
        self.policy, self.pool, self.model, self.traffic = policy, policy.pool, QuickModel(model), traffic
        self.doors_ms = {tp: self.model.door_ms(tp) for tp in self.model.tp_sizes}
        self.nodes = {n.agent_id: _Node(n) for n in sorted(nodes, key=lambda n: n.agent_id)}
        tiers = tuple(t.name for t in self.pool.tiers)
        self.background = {t.name: t.background for t in self.pool.tiers}
        self.gateways = [Gateway(f"gateway-{i}", self.pool.name, tiers) for i in range(gateways)]
        self.estimator = DemandEstimator()
        self.foresight = Foresight(self.pool.name, tiers, traffic) if policy.foresight_s else None
        self.outcomes: list[Outcome | None] = [None] * len(traffic.requests)
        self.left = len(traffic.requests)
        self.layouts: list[LayoutAt] = []
        self.flips = self.gpus_max = self.retractions = 0
        self.now = 0.0
        self._awake: dict[str, Key] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()
        self._moved_gpus = False
        self._groups: list[SimGroup] = []
        """Open ones in order, for round robin."""

    # The clock

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._serial), what))

    def run(self, progress: Callable[[float], None] = lambda _: None) -> RunResult:
        """`progress` hears the simulated second, about once each."""
        self._begin()
        requests, heap, pop = self.traffic.requests, self._heap, heapq.heappop
        i, n, last = 0, len(requests), self.traffic.duration_s + DRAIN_S
        shown = 0.0
        while self.left:
            if i < n and (not heap or requests[i].arrived <= heap[0][0]):
                self.now = requests[i].arrived
                self._arrive(requests[i])
                i += 1
                continue
            if not heap or heap[0][0] > last:
                break
            self.now, _, what = pop(heap)
            if self.now - shown >= 1:
                progress(self.now)
                shown = self.now
            what()
            if self._moved_gpus:
                self._record()
        outcomes = tuple(o or Outcome(r.tier, r.arrived, Ending.FAILED) for o, r in zip(self.outcomes, requests, strict=True))
        retractions = self.retractions + sum(g.engine.retractions for g in self._all())
        return RunResult(
            self.policy.name,
            self.traffic.duration_s,
            outcomes,
            tuple(self.layouts),
            self.flips,
            self.gpus_max,
            retractions,
            self.now,
            self.policy.note,
        )

    def _begin(self) -> None:
        if self.policy.first is not None:
            for agent_id, layout in sorted(self.policy.first.items()):
                self.nodes[agent_id].layout = layout
                for g in layout.groups:
                    self._wake(self.nodes[agent_id], g)
                self._link(self.nodes[agent_id])
        if self.policy.planner is not None:
            self._cycle(0.0)
        self._check()
        self._record()
        for i, gateway in enumerate(self.gateways):
            gateway.refresh()
            self._at(VIEW_S * (i + 1) / (len(self.gateways) + 1), lambda g=gateway: self._look(g))  # type: ignore[misc]

    def _look(self, gateway: Gateway) -> None:
        gateway.refresh()
        self._at(self.now + VIEW_S, lambda: self._look(gateway))

    # Requests

    def _arrive(self, r: Request) -> None:
        live = Live(r, str(r.rid), r.rid % len(self.gateways))
        gateway = self.gateways[live.gateway]
        gateway.arrived(r.tier, r.prompt)
        if self.policy.planner is None:
            return self._plain(live, gateway)
        live.stream = routing.Stream(r.tier, self.background[r.tier], self.now)
        self._carry_out(live, live.stream.start(gateway.routes, self.now))

    def _plain(self, live: Live, gateway: Gateway) -> None:
        g = self._groups[gateway.turn % len(self._groups)]
        gateway.turn += 1
        if not g.engine.fits(live.request.prompt):
            return self._end(live, Ending.FAILED)
        live.group = g
        g.lives[live.rid] = live
        self._start(g, live)

    def _carry_out(self, live: Live, commands: list[routing.Command]) -> None:
        assert live.stream is not None
        for c in commands:
            if isinstance(c, routing.Submit):
                self._submit(live, c)
            elif isinstance(c, routing.Retry):
                self._at(self.now + c.after_s, lambda: self._feed(live, routing.Retried()))
            elif isinstance(c, routing.Fail):
                self._end(live, Ending.REFUSED if c.status == 429 else Ending.FAILED)
            elif isinstance(c, routing.Done):
                self._end(live, Ending.FINISHED)

    def _feed(self, live: Live, event: routing.Event) -> None:
        assert live.stream is not None
        self._carry_out(live, live.stream.handle(event, self.gateways[live.gateway].routes, self.now))

    def _submit(self, live: Live, c: routing.Submit) -> None:
        r, gateway = live.request, self.gateways[live.gateway]
        gateway.routes.submitted(c.group)
        node = self.nodes[c.group[0]]
        node.onward.arrived((live.gateway, live.rid))
        g = node.groups.get(c.group[1])
        if g is None:
            closed = node.ending.get(c.group[1])
            return self._feed(live, routing.Moved(c.hop, self._successors(node, closed.group if closed else None)))
        if not g.engine.fits(r.prompt + live.made):
            return self._feed(live, routing.Refused(c.hop, fatal="longer than the KV of this group"))
        left = max(r.max_new - live.made, 1)
        entry = Entry(
            live.rid,
            r.tier,
            ADMISSIONS[c.admission],
            kv_promise(r.prompt + live.made, left),
            r.arrived,
            self.now + QUEUE_S,
            False,
            live.made > 0,
        )
        live.group = g
        if not g.open:
            g.gathered.append((entry, live))
            self._news(g)
        else:
            self._offer(g, live, entry, c.hop)

    def _offer(self, g: SimGroup, live: Live, entry: Entry, hop: int) -> None:
        answer = g.ledger.submit(entry, self.now)
        if isinstance(answer, Full):
            live.group = None
            return self._feed(live, routing.Refused(hop, answer.retry_after_ms))
        g.lives[live.rid] = live
        if isinstance(answer, Admitted):
            self._start(g, live)
        self._news(g)

    def _start(self, g: SimGroup, live: Live) -> None:
        live.starts += 1
        if live.loads and live.warm_at == g.key[0]:
            load_ms = self.policy.kv_load.load_ms(live.request.prompt + live.made, g.group.tp_size) if self.policy.kv_load else None
            if load_ms is not None:
                g.loaded_at = max(g.loaded_at, self.now) + load_ms / 1e3
                return self._at(g.loaded_at, lambda starts=live.starts: self._loaded(g, live, starts))  # type: ignore[misc]
            live.warm_at = ""
        self._run(g, live)

    def _loaded(self, g: SimGroup, live: Live, starts: int) -> None:
        if live.starts == starts and live.group is g and g.open:
            self._run(g, live)

    def _run(self, g: SimGroup, live: Live) -> None:
        r = live.request
        live.loads = False
        live.seq = Seq(r.rid, r.prompt, r.output, r.max_new, live.made, live.warm_at == g.key[0])
        live.warm_at = ""
        g.engine.submit(live.seq, self.now)
        self._due(g)

    def _started(self, g: SimGroup, entries: list[Entry]) -> None:
        for e in entries:
            self._start(g, g.lives[e.rid])

    def _news(self, g: SimGroup) -> None:
        for gateway in self.gateways:
            gateway.stale.add(g)

    def _due(self, g: SimGroup) -> None:
        when = g.engine.next_at
        if when != g.due_at:
            g.due_at = when
            if when < NEVER:
                self._at(when, lambda: self._advance(g, when))

    def _advance(self, g: SimGroup, when: float) -> None:
        if g.engine.next_at != when or g.due_at != when:
            return  # planned anew since
        for what, seq in g.engine.advance():
            live = g.lives[str(seq.rid)]
            if what is Happened.FIRST:
                if live.first_at < 0:
                    live.first_at, live.door_ms = self.now, self.doors_ms[g.group.tp_size]
            elif what is Happened.HANDED_OVER:
                self._hand_over(g, live, seq)
            else:
                self._finished(g, live, seq)
        if g.closing and not g.lives:
            self._drained(g)
        self._due(g)

    def _tokens(self, live: Live, seq: Seq) -> None:
        """Up to now: each token exactly once, as the router counts them."""
        assert live.made <= seq.made <= live.request.output, (live.made, seq)
        if live.stream is not None and seq.made > live.made:
            live.stream.handle(routing.Tokens(live.stream.hop, (0,) * (seq.made - live.made)), (), self.now)
            assert live.stream.delivered == seq.made, (live.stream.delivered, seq)
        live.made = seq.made

    def _hand_over(self, g: SimGroup, live: Live, seq: Seq) -> None:
        """Abort after the first token, and resume where it is decoded: its KV is in the node's store by then."""
        self._tokens(live, seq)
        del g.lives[live.rid]
        live.warm_at, live.loads = g.key[0], True
        n = self.nodes[g.key[0]]
        taker = n.onward.depart(live.rid, (live.gateway, live.rid), self.now)
        to = next((o for o in n.groups.values() if o.ledger is taker), None)
        g.ledger.release(live.rid, self.now)
        live.group = None
        assert live.stream is not None
        successors = ((to.key, to.epoch),) if to is not None else self._successors(n, g.group)
        self._feed(live, routing.Moved(live.stream.hop, successors))
        self._started(g, g.ledger.start())
        self._news(g)

    def _finished(self, g: SimGroup, live: Live, seq: Seq) -> None:
        self._tokens(live, seq)
        del g.lives[live.rid]
        if live.stream is None:
            return self._end(live, Ending.FINISHED)
        self._started(g, g.ledger.finish(live.rid, self.now))
        self._news(g)
        if g.group.role is Role.DECODE:  # a place that prefill groups may have waited for
            for other in self.nodes[g.key[0]].groups.values():
                if other.ledger.onward is not None:
                    self._started(other, other.ledger.start())
        self._feed(live, routing.Finished(live.stream.hop))

    def _end(self, live: Live, ending: Ending) -> None:
        r = live.request
        assert self.outcomes[r.rid] is None, f"request {r.rid} ended twice"
        if ending is Ending.FINISHED and live.made < r.output:
            ending = Ending.FAILED  # cut off: the group's KV ends before its output does
        ttft = (live.first_at - r.arrived) * 1e3 + live.door_ms if live.first_at >= 0 else None
        tpot = (self.now - live.first_at) * 1e3 / (r.output - 1) if ending is Ending.FINISHED and r.output > 1 else None
        self.outcomes[r.rid] = Outcome(r.tier, r.arrived, ending, ttft, tpot)
        self.left -= 1
        self.gateways[live.gateway].ended(r.tier, live.made if ending is Ending.FINISHED else None)

    # Layouts

    def _count_running(self) -> None:
        """What each stream has made by now, as gateways know; of very many, one in so many stands for all."""
        of = 1 + sum(len(g.lives) for g in self._all()) // COUNTED_MAX
        for g in self._all():
            for rid, made in g.engine.made_at(self.now):
                if rid % of == 0 and made > 0:
                    live = g.lives[str(rid)]
                    self.gateways[live.gateway].runs(live.request.tier, made, of)

    def _cycle(self, seconds: float) -> None:
        """What the operator does each second: reports in, plan out."""
        policy = self.policy
        assert self.planner is not None
        if seconds and self.foresight is None:
            self._count_running()
        for gateway in self.gateways:
            for w in gateway.windows(self.now, seconds) if seconds else ():
                self.estimator.observe(w)
        changing = (g for n in self.nodes.values() if n.wanted for g in (*n.ending.values(), *n.groups.values()))
        self.estimator.freeze(self.pool.name, self.now, {t for g in changing if g.closing or not g.open for t in g.tiers})
        for g in list(self._all()):
            if g.ledger.queued_total:
                self._expire(g)
        for g in list(self._all()):
            if g.ledger.onward is not None and g.open:
                self._started(g, g.ledger.start())
        demand = self.foresight(self.now, policy.foresight_s) if self.foresight else self.estimator.estimate(self.now)
        name = self.pool.name
        taken = Snapshot(
            (self.pool,), tuple(map(self._view, self.nodes.values())), demand, {name: self.model}, {name: policy.flip_cost}, policy.settings
        )
        for wanted in self.planner(taken, self.now).nodes:
            self._apply(self.nodes[wanted.agent_id], wanted)
        self._check()
        self._at(self.now + policy.interval_s, lambda: self._cycle(policy.interval_s))

    def _view(self, n: _Node) -> NodeView:
        tokens = {g.group.group_id: g.engine.resident_at(self.now) for g in (*n.groups.values(), *n.ending.values())}
        return NodeView(n.node, n.residency, n.layout, tokens, n.wanted is not None, True, n.flipped_at)

    def _expire(self, g: SimGroup) -> None:
        for e in g.ledger.expire(self.now):
            live = g.lives.pop(e.rid)
            assert live.stream is not None
            self._feed(live, routing.Refused(live.stream.hop, 1000))

    def _apply(self, n: _Node, wanted: NodePlan) -> None:
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
                self._started(g, started)
                if g.tiers != seen[0]:
                    self._moved_gpus = True
                if started or seen != (g.tiers, g.group.capacity.max_running):
                    self._news(g)
        if len(kept) == len(new) == len(n.groups):
            return self._link(n)
        if not n.groups:  # nothing is given up: engines wake where none ran
            for group in wanted.layout.groups:
                self._wake(n, group)
            return self._link(n)
        self._flip(n, wanted, [g for i, g in n.groups.items() if i not in kept])

    def _limits(self, n: _Node, group: Group) -> EngineLimits:
        return replace(self.policy.limits(group), hands_over=bool(n.layout.hands_over(group)))

    def _link(self, n: _Node) -> None:
        """Ledgers that hand over look at those that take in."""
        prefill, decode = (tuple(g.ledger for g in n.groups.values() if g.group.role is role) for role in (Role.PREFILL, Role.DECODE))
        news = n.onward.link(prefill, decode)
        for g in list(n.groups.values()):
            if g.ledger in news and g.open:
                self._started(g, g.ledger.start())

    def _flip(self, n: _Node, wanted: NodePlan, ended: list[SimGroup]) -> None:
        """A's groups close; B's gather what comes from now on and open when A's engines have stopped and the pause is over."""
        self.flips += 1
        n.wanted, n.epoch = wanted, n.epoch + 1
        for g in ended:
            g.closing = True
            g.engine.limits = replace(g.engine.limits, hands_over=False)  # what it lets finish ends there
            n.groups.pop(g.group.group_id)
            n.ending[g.group.group_id] = g
            self._news(g)
        for group in wanted.layout.groups:
            if group.group_id not in n.groups:
                self._place(n, group)
        self._link(n)
        n.draining = [g for g in ended if g.lives] if wanted.mode is FlipMode.LET_FINISH else []
        for g in list(n.draining):
            for e in g.ledger.empty_queues():
                self._moved(n, g, g.lives.pop(e.rid))
            if not g.lives:
                n.draining.remove(g)
        if not n.draining:
            self._switch(n)
        elif wanted.let_finish_s < math.inf:
            self._at(self.now + wanted.let_finish_s, lambda: self._waited(n, wanted))

    def _waited(self, n: _Node, wanted: NodePlan) -> None:
        """LET_FINISH waits no longer."""
        if n.wanted is wanted and n.draining:
            n.draining = []
            self._switch(n)

    def _drained(self, g: SimGroup) -> None:
        n = self.nodes[g.key[0]]
        if g in n.draining:
            n.draining.remove(g)
            if not n.draining:
                self._switch(n)

    def _switch(self, n: _Node) -> None:
        """A's engines stop, B's wake after the pause; streams go to B at once and wait there."""
        assert n.wanted is not None
        kept, ended = n.wanted.mode is FlipMode.MIGRATE_FIRST, list(n.ending.values())
        to_tp = max((g.group.tp_size for g in n.groups.values() if not g.open), default=1)
        # KV that is computed again costs its prefill in the engine, below; only what is copied is part of the pause.
        cost = self.policy.flip_cost
        pauses = [cost.pause_ms(g.engine.resident_at(self.now) if kept else 0, n.wanted.mode, g.group.tp_size, to_tp) for g in ended]
        pause_s = max(pauses, default=0.0) / 1e3
        gone = []
        for g in ended:
            warm = set(g.engine.running) if kept else ()
            for seq in g.engine.stop(self.now):
                live = g.lives[str(seq.rid)]
                live.warm_at = n.node.agent_id if seq.rid in warm else ""
                self._tokens(live, seq)
            self._due(g)
            gone += [(g, live) for live in g.lives.values()]
            self._sleep(n, g)
        for g, live in gone:
            self._moved(n, g, live)
        self._check()
        if pause_s > 0:
            self._at(self.now + pause_s, lambda: self._opened(n))
        else:
            self._opened(n)

    def _moved(self, n: _Node, g: SimGroup, live: Live) -> None:
        assert live.stream is not None
        live.group = None
        self._feed(live, routing.Moved(live.stream.hop, self._successors(n, g.group)))

    def _successors(self, n: _Node, ended: Group | None) -> tuple[tuple[Key, int], ...]:
        if ended is None:
            return tuple((g.key, g.epoch) for _, g in sorted(n.groups.items()))
        return tuple((n.groups[g.group_id].key, n.groups[g.group_id].epoch) for g in n.layout.successors(ended))

    def _opened(self, n: _Node) -> None:
        n.wanted, n.flipped_at = None, self.now
        for g in list(n.groups.values()):
            if not g.open:
                self._open(g)
        self._moved_gpus = True

    def _wake(self, n: _Node, group: Group) -> None:
        self._open(self._place(n, group))

    def _place(self, n: _Node, group: Group) -> SimGroup:
        engine = Engine(self.model.times[group.tp_size], self._kv(group), self._limits(n, group))
        g = SimGroup((n.node.agent_id, group.group_id), group, n.epoch, engine, Ledger(group.capacity, group.shares, engine.kv_tokens))
        g.serve(group, engine.kv_tokens if self.policy.planner else 0)
        n.groups[group.group_id] = g
        self._news(g)
        self._moved_gpus = True
        return g

    def _open(self, g: SimGroup) -> None:
        for uuid in g.group.gpu_uuids:
            assert uuid not in self._awake, f"two engines awake on {uuid}: {g.key}, {self._awake[uuid]}"
            self._awake[uuid] = g.key
        g.open = True
        self._groups.append(g)
        gathered, g.gathered = g.gathered, []
        for entry, live in sorted(gathered, key=lambda x: (not x[0].moved, x[0].arrived)):
            assert live.stream is not None
            self._offer(g, live, entry, live.stream.hop)
        self._news(g)

    def _sleep(self, n: _Node, g: SimGroup) -> None:
        assert g.engine.next_at == NEVER, "an engine sleeps at work"
        for uuid in g.group.gpu_uuids:
            assert self._awake[uuid] == g.key, (uuid, g.key)
            del self._awake[uuid]
        self._groups.remove(g)
        g.open, g.lives = False, {}
        self.retractions += g.engine.retractions
        del n.ending[g.group.group_id]
        self._moved_gpus = True

    def _kv(self, group: Group) -> int:
        return self.model.kv_capacity_tokens(group.tp_size, self.policy.resident_tp)

    def _all(self) -> Iterable[SimGroup]:
        return (g for n in self.nodes.values() for g in (*n.groups.values(), *n.ending.values()))

    def _record(self) -> None:
        self._moved_gpus = False
        gpus: Counter[tuple[int, tuple[str, ...]]] = Counter()
        for n in self.nodes.values():
            for g in (*n.groups.values(), *n.ending.values()):
                if g.open:
                    gpus[g.group.tp_size, tuple(sorted(g.tiers))] += g.group.tp_size
                else:
                    gpus[0, ()] += sum(u not in self._awake for u in g.group.gpu_uuids)
        rows = tuple((tp, tiers, count) for (tp, tiers), count in sorted(gpus.items()) if count)
        if self.layouts and self.layouts[-1].at == self.now:
            self.layouts.pop()
        if not self.layouts or self.layouts[-1].gpus != rows:
            self.layouts.append(LayoutAt(self.now, rows))

    def _check(self) -> None:
        """GPUs in use, by engines awake or about to be; that no two are awake on one is checked as they wake."""
        used = 0
        for n in self.nodes.values():
            uuids = [u for g in n.groups.values() for u in g.group.gpu_uuids]
            assert len(set(uuids)) == len(uuids), f"{n.node.agent_id}: a GPU twice"
            held = {*uuids, *(u for g in n.ending.values() for u in g.group.gpu_uuids)}
            assert held <= {g.uuid for g in n.node.gpus}, f"{n.node.agent_id}: foreign GPUs"
            used += len(held)
        assert used <= self.pool.budget_gpus, f"{used} GPUs in use, the budget is {self.pool.budget_gpus}"
        self.gpus_max = max(self.gpus_max, used)
