"""Requests on their way: from arrival through a gateway's routing and a group's ledger and engine to their end."""

from nitsum import routing
from nitsum.layout import Role
from nitsum.ledger import Admission, Admitted, Entry, Full, kv_promise
from nitsum.routing import AdmissionClass
from nitsum.sim.clock import Clock
from nitsum.sim.engine import NEVER, Happened, Seq
from nitsum.sim.gateway import Gateway
from nitsum.sim.gpus import Gpus
from nitsum.sim.group import Live, SimGroup
from nitsum.sim.node import SimNode
from nitsum.sim.policies import Policy
from nitsum.sim.request import Request
from nitsum.sim.result import Ending, Outcome
from nitsum.sim.steptimes import QuickModel

ADMISSIONS = {
    AdmissionClass.FEASIBLE: Admission.FEASIBLE,
    AdmissionClass.BEST_EFFORT: Admission.BEST_EFFORT,
    AdmissionClass.BACKGROUND: Admission.BACKGROUND,
}
QUEUE_S = 60.0
"""As the engine host's: how long a request waits in a group's queue."""


class Lives:
    """`outcomes`: by request, of those that have ended."""

    def __init__(
        self, clock: Clock, policy: Policy, model: QuickModel, nodes: dict[str, SimNode], gateways: list[Gateway], gpus: Gpus
    ) -> None:
        self.clock, self.policy, self.nodes, self.gateways, self.gpus = clock, policy, nodes, gateways, gpus
        self.doors_ms = {tp: model.door_ms(tp) for tp in model.tp_sizes}
        self.background = {t.name: t.background for t in policy.pool.tiers}
        self.outcomes: dict[int, Outcome] = {}

    # Routing

    def arrive(self, r: Request) -> None:
        live = Live(r, str(r.rid), r.rid % len(self.gateways))
        gateway = self.gateways[live.gateway]
        gateway.arrived(r.tier, r.prompt)
        if self.policy.planner is None:
            return self._plain(live, gateway)
        live.stream = routing.Stream(r.tier, self.background[r.tier], self.clock.now)
        self._carry_out(live, live.stream.start(gateway.routes, self.clock.now))

    def _plain(self, live: Live, gateway: Gateway) -> None:
        g = self.gpus.groups[gateway.turn % len(self.gpus.groups)]
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
                self.clock.at(self.clock.now + c.after_s, lambda: self._feed(live, routing.Retried()))
            elif isinstance(c, routing.Fail):
                self._end(live, Ending.REFUSED if c.status == 429 else Ending.FAILED)
            elif isinstance(c, routing.Done):
                self._end(live, Ending.FINISHED)

    def _feed(self, live: Live, event: routing.Event) -> None:
        assert live.stream is not None
        self._carry_out(live, live.stream.handle(event, self.gateways[live.gateway].routes, self.clock.now))

    # A group: its ledger, then its engine

    def _submit(self, live: Live, c: routing.Submit) -> None:
        r, gateway = live.request, self.gateways[live.gateway]
        gateway.routes.submitted(c.group)
        node = self.nodes[c.group[0]]
        node.onward.arrived((live.gateway, live.rid))
        g = node.groups.get(c.group[1])
        if g is None:
            closed = node.ending.get(c.group[1])
            return self._feed(live, routing.Moved(c.hop, node.successors(closed.group if closed else None)))
        if not g.engine.fits(r.prompt + live.made):
            return self._feed(live, routing.Refused(c.hop, fatal="longer than the KV of this group"))
        left = max(r.max_new - live.made, 1)
        entry = Entry(
            live.rid,
            r.tier,
            ADMISSIONS[c.admission],
            kv_promise(r.prompt + live.made, left),
            r.arrived,
            self.clock.now + QUEUE_S,
            False,
            live.made > 0,
        )
        live.group = g
        if not g.open:
            g.gathered.append((entry, live))
            self.news(g)
        else:
            self._offer(g, live, entry, c.hop)

    def _offer(self, g: SimGroup, live: Live, entry: Entry, hop: int) -> None:
        answer = g.ledger.submit(entry, self.clock.now)
        if isinstance(answer, Full):
            live.group = None
            return self._feed(live, routing.Refused(hop, answer.retry_after_ms))
        g.lives[live.rid] = live
        if isinstance(answer, Admitted):
            self._start(g, live)
        self.news(g)

    def _start(self, g: SimGroup, live: Live) -> None:
        live.starts += 1
        if live.loads and live.warm_at == g.key[0]:
            load_ms = self.policy.kv_load.load_ms(live.request.prompt + live.made, g.group.tp_size) if self.policy.kv_load else None
            if load_ms is not None:
                g.loaded_at = max(g.loaded_at, self.clock.now) + load_ms / 1e3
                return self.clock.at(g.loaded_at, lambda starts=live.starts: self._loaded(g, live, starts))  # type: ignore[misc]
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
        g.engine.submit(live.seq, self.clock.now)
        self._due(g)

    def _due(self, g: SimGroup) -> None:
        when = g.engine.next_at
        if when != g.due_at:
            g.due_at = when
            if when < NEVER:
                self.clock.at(when, lambda: self._advance(g, when))

    def _advance(self, g: SimGroup, when: float) -> None:
        if g.engine.next_at != when or g.due_at != when:
            return  # planned anew since
        for what, seq in g.engine.advance():
            live = g.lives[str(seq.rid)]
            if what is Happened.FIRST:
                if live.first_at < 0:
                    live.first_at, live.door_ms = self.clock.now, self.doors_ms[g.group.tp_size]
            elif what is Happened.HANDED_OVER:
                self._hand_over(g, live, seq)
            else:
                self._finished(g, live, seq)
        if g.drained and not g.lives:
            g.drained()
        self._due(g)

    def _tokens(self, live: Live, seq: Seq) -> None:
        """Up to now: each token exactly once, as the router counts them."""
        assert live.made <= seq.made <= live.request.output, (live.made, seq)
        if live.stream is not None and seq.made > live.made:
            live.stream.handle(routing.Tokens(live.stream.hop, (0,) * (seq.made - live.made)), (), self.clock.now)
            assert live.stream.delivered == seq.made, (live.stream.delivered, seq)
        live.made = seq.made

    def _hand_over(self, g: SimGroup, live: Live, seq: Seq) -> None:
        """Abort after the first token, and resume where it is decoded: its KV is in the node's store by then."""
        self._tokens(live, seq)
        del g.lives[live.rid]
        live.warm_at, live.loads = g.key[0], True
        n = self.nodes[g.key[0]]
        taker = n.onward.depart(live.rid, (live.gateway, live.rid), self.clock.now)
        to = next((o for o in n.groups.values() if o.ledger is taker), None)
        g.ledger.release(live.rid, self.clock.now)
        live.group = None
        assert live.stream is not None
        successors = ((to.key, to.epoch),) if to is not None else n.successors(g.group)
        self._feed(live, routing.Moved(live.stream.hop, successors))
        self.started(g, g.ledger.start())
        self.news(g)

    def _finished(self, g: SimGroup, live: Live, seq: Seq) -> None:
        self._tokens(live, seq)
        del g.lives[live.rid]
        if live.stream is None:
            return self._end(live, Ending.FINISHED)
        self.started(g, g.ledger.finish(live.rid, self.clock.now))
        self.news(g)
        if g.group.role is Role.DECODE:  # a place that prefill groups may have waited for
            for other in self.nodes[g.key[0]].groups.values():
                if other.ledger.onward is not None:
                    self.started(other, other.ledger.start())
        self._feed(live, routing.Finished(live.stream.hop))

    def _end(self, live: Live, ending: Ending) -> None:
        r = live.request
        assert r.rid not in self.outcomes, f"request {r.rid} ended twice"
        if ending is Ending.FINISHED and live.made < r.output:
            ending = Ending.FAILED  # cut off: the group's KV ends before its output does
        ttft = (live.first_at - r.arrived) * 1e3 + live.door_ms if live.first_at >= 0 else None
        tpot = (self.clock.now - live.first_at) * 1e3 / (r.output - 1) if ending is Ending.FINISHED and r.output > 1 else None
        self.outcomes[r.rid] = Outcome(r.tier, r.arrived, ending, ttft, tpot)
        self.gateways[live.gateway].ended(r.tier, live.made if ending is Ending.FINISHED else None)

    # What else happens to a group

    def news(self, g: SimGroup) -> None:
        for gateway in self.gateways:
            gateway.stale.add(g)

    def started(self, g: SimGroup, entries: list[Entry]) -> None:
        for e in entries:
            self._start(g, g.lives[e.rid])

    def expire(self, g: SimGroup) -> None:
        for e in g.ledger.expire(self.clock.now):
            live = g.lives.pop(e.rid)
            assert live.stream is not None
            self._feed(live, routing.Refused(live.stream.hop, 1000))

    def let_in(self, g: SimGroup) -> None:
        """It has opened: what it has gathered goes to its ledger."""
        gathered, g.gathered = g.gathered, []
        for entry, live in sorted(gathered, key=lambda x: (not x[0].moved, x[0].arrived)):
            assert live.stream is not None
            self._offer(g, live, entry, live.stream.hop)
        self.news(g)

    def stop(self, g: SimGroup, kept: bool) -> list[Live]:
        """Its engine stops: who leaves, to be moved. `kept`: with the KV of what ran."""
        warm = set(g.engine.running) if kept else ()
        for seq in g.engine.stop(self.clock.now):
            live = g.lives[str(seq.rid)]
            live.warm_at = g.key[0] if seq.rid in warm else ""
            self._tokens(live, seq)
        self._due(g)
        left, g.lives = list(g.lives.values()), {}
        return left

    def moved(self, n: SimNode, g: SimGroup, live: Live) -> None:
        """It has left a group that closes."""
        assert live.stream is not None
        live.group = None
        self._feed(live, routing.Moved(live.stream.hop, n.successors(g.group)))
