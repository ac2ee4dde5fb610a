"""Which event leads from which state to which, and what is to be done then."""

from nitsum.flip.messages import (
    AbortStreams,
    CloseGroups,
    Command,
    DeadlinePassed,
    EngineEnded,
    EngineParked,
    EngineWoken,
    Event,
    FlipRequested,
    GroupsClosed,
    GroupsOpened,
    KillEngine,
    OpenGroups,
    ParkEngine,
    StreamsEnded,
    WakeEngine,
)
from nitsum.flip.states import AT_REST, ENDED, Deadlines, EngineState, FlipState
from nitsum.layout import FlipMode, Group, Layout


def _same(a: Group, b: Group) -> bool:
    return (a.group_id, a.engine_id, a.gpu_uuids, a.pool, a.model) == (b.group_id, b.engine_id, b.gpu_uuids, b.pool, b.model)


class Flip:
    """One flip. `epoch` is the node's before it; B serves at epoch + 1, an A that comes back at epoch + 2."""

    def __init__(self, before: Layout, after: Layout, mode: FlipMode, epoch: int, deadlines: Deadlines) -> None:
        kept = {a.group_id for a in before.groups for b in after.groups if _same(a, b)}
        self.closing = tuple(g for g in before.groups if g.group_id not in kept)
        self.opening = tuple(g for g in after.groups if g.group_id not in kept)
        self.after, self.mode, self.epoch, self.deadlines = after, mode, epoch, deadlines
        self.state = FlipState.IDLE
        self.deadline: float | None = None
        """When DeadlinePassed is due, on the clock of `now`."""
        self.message = ""
        self._aborted = False
        self._gpus = {g.engine_id: g.gpu_uuids for g in (*self.closing, *self.opening)}
        self.engines = {g.engine_id: EngineState.PARKED for g in self.opening} | {g.engine_id: EngineState.AWAKE for g in self.closing}
        # The same engine under another group id parks and wakes again.
        self._from = [g.engine_id for g in self.closing]
        self._to = [g.engine_id for g in self.opening]

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def handle(self, event: Event, now: float) -> list[Command]:
        """The one door. Events that come too late are ignored."""
        commands = [] if self.ended else self._handle(event, now)
        self._check()
        return commands

    def _handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case FlipRequested(dead) if self.state is FlipState.IDLE:
                for e in dead & self.engines.keys():
                    self.engines[e] = EngineState.DEAD
                if lost := [e for e in self._to if self.engines[e] is EngineState.DEAD and e not in self._from]:
                    self._to_state(FlipState.REVERTED, None, f"engines {', '.join(lost)} are not running; nothing was touched")
                    return []
                self._to_state(FlipState.CLOSING, None)
                ids = tuple(tuple(s.group_id for s in self.after.successors(g)) for g in self.closing)
                return [CloseGroups(self.closing, ids, self.opening, self.epoch + 1)]
            case GroupsClosed() if self.state is FlipState.CLOSING:
                if self.mode is FlipMode.LET_FINISH and self.deadlines.let_finish_s > 0:
                    self._to_state(FlipState.ENDING, now + self.deadlines.let_finish_s)
                    return []
                self._to_state(FlipState.ENDING, None)
                return self._abort(now)
            case StreamsEnded() if self.state is FlipState.ENDING:
                return self._park(now)
            case EngineParked(e) if self.engines.get(e) is EngineState.PARKING:
                self.engines[e] = EngineState.PARKED
                return self._advance(now)
            case EngineWoken(e) if self.engines.get(e) is EngineState.WAKING:
                self.engines[e] = EngineState.AWAKE
                return self._advance(now)
            case EngineEnded(e) if e in self.engines:
                self.engines[e] = EngineState.DEAD
                return self._advance(now)
            case GroupsOpened() if self.state is FlipState.OPENING:
                self._to_state(FlipState.DONE, None)
            case GroupsOpened() if self.state is FlipState.REOPENING:
                gone = [e for e in self._from if self.engines[e] is not EngineState.AWAKE]
                self._to_state(FlipState.FAILED if gone else FlipState.REVERTED, None)
            case DeadlinePassed() if self.deadline is not None and now >= self.deadline:
                return self._late(now)
        return []

    def _late(self, now: float) -> list[Command]:
        self.deadline = None
        match self.state:
            case FlipState.ENDING:
                return self._park(now) if self._aborted else self._abort(now)
            case FlipState.PARKING:
                return self._kill(self._from)
            case FlipState.WAKING:
                late = [e for e in self._to if self.engines[e] is EngineState.WAKING]
                return self._revert(now, f"{', '.join(late)} did not wake within {self.deadlines.wake_s:g} s")
            case FlipState.REVERTING:
                return self._kill(self._to)
            case FlipState.REWAKING:
                return self._kill([e for e in self._from if self.engines[e] is not EngineState.AWAKE])
        return []

    def _to_state(self, state: FlipState, deadline: float | None, message: str = "") -> None:
        self.state, self.deadline = state, deadline
        self.message = message or self.message

    def _abort(self, now: float) -> list[Command]:
        self._aborted, self.deadline = True, now + self.deadlines.end_s
        return [AbortStreams(self.closing)]

    def _park(self, now: float) -> list[Command]:
        self._to_state(FlipState.PARKING, now + self.deadlines.park_s)
        return self._park_awake(self._from) or self._advance(now)

    def _park_awake(self, engines: list[str]) -> list[Command]:
        awake = [e for e in engines if self.engines[e] is EngineState.AWAKE]
        for e in awake:
            self.engines[e] = EngineState.PARKING
        return [ParkEngine(e) for e in awake]

    def _wake(self, engines: list[str]) -> list[Command]:
        parked = [e for e in engines if self.engines[e] is EngineState.PARKED]
        for e in parked:
            self.engines[e] = EngineState.WAKING
        return [WakeEngine(e) for e in parked]

    def _kill(self, engines: list[str]) -> list[Command]:
        late = [e for e in engines if self.engines[e] not in (*AT_REST, EngineState.KILLING)]
        for e in late:
            self.engines[e] = EngineState.KILLING
        return [KillEngine(e) for e in late]

    def _revert(self, now: float, message: str) -> list[Command]:
        """What is in between cannot be trusted to stay asleep: it is killed. What woke is parked."""
        self._to_state(FlipState.REVERTING, now + self.deadlines.park_s, message)
        commands = self._kill([e for e in self._to if self.engines[e] is EngineState.WAKING]) + self._park_awake(self._to)
        return commands or self._advance(now)

    def _advance(self, now: float) -> list[Command]:
        of = self.engines
        match self.state:
            case FlipState.PARKING if all(of[e] in AT_REST for e in self._from):
                if lost := [e for e in self._to if of[e] is EngineState.DEAD]:
                    return self._revert(now, f"{', '.join(lost)} ended before it could wake")
                self._to_state(FlipState.WAKING, now + self.deadlines.wake_s)
                return self._wake(self._to) or self._advance(now)
            case FlipState.WAKING if lost := [e for e in self._to if of[e] is EngineState.DEAD]:
                return self._revert(now, f"{', '.join(lost)} ended while waking")
            case FlipState.WAKING if all(of[e] is EngineState.AWAKE for e in self._to):
                self._to_state(FlipState.OPENING, None)
                return [OpenGroups(self.opening, (), self.closing, self.epoch + 1)]
            case FlipState.REVERTING if all(of[e] in AT_REST for e in self._to):
                self._to_state(FlipState.REWAKING, now + self.deadlines.wake_s)
                return self._wake(self._from) or self._advance(now)
            case FlipState.REWAKING if all(of[e] in (EngineState.AWAKE, EngineState.DEAD) for e in self._from):
                self._to_state(FlipState.REOPENING, None)
                awake = tuple(g for g in self.closing if of[g.engine_id] is EngineState.AWAKE)
                failed = tuple(g for g in self.closing if g not in awake)
                return [OpenGroups(awake, failed, self.opening, self.epoch + 2)]
        return []

    def _check(self) -> None:
        busy: dict[str, str] = {}
        for engine, state in self.engines.items():
            if state not in AT_REST:
                for gpu in self._gpus[engine]:
                    assert gpu not in busy, f"{engine} and {busy[gpu]} are both awake on {gpu} in {self.state}"
                    busy[gpu] = engine
        assert self.deadline is None or self.state in (
            FlipState.ENDING,
            FlipState.PARKING,
            FlipState.WAKING,
            FlipState.REVERTING,
            FlipState.REWAKING,
        ), self.state
