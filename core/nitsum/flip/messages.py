"""What the flip machine is told, and what it answers."""

from dataclasses import dataclass

from nitsum.layout import Group

# Events


@dataclass(frozen=True)
class FlipRequested:
    """`dead`: engines that are not running as the flip begins."""

    dead: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GroupsClosed: ...


@dataclass(frozen=True)
class StreamsEnded: ...


@dataclass(frozen=True)
class EngineParked:
    engine_id: str


@dataclass(frozen=True)
class EngineWoken:
    engine_id: str


@dataclass(frozen=True)
class EngineEnded:
    """Its processes are gone, killed or not."""

    engine_id: str


@dataclass(frozen=True)
class GroupsOpened: ...


@dataclass(frozen=True)
class DeadlinePassed: ...


Event = FlipRequested | GroupsClosed | StreamsEnded | EngineParked | EngineWoken | EngineEnded | GroupsOpened | DeadlinePassed

# Commands


@dataclass(frozen=True)
class CloseGroups:
    """Refuse new work on `groups` naming `successors[i]` (ids) at `epoch`; the groups in `opening` become known and gather waiting work."""

    groups: tuple[Group, ...]
    successors: tuple[tuple[str, ...], ...]
    opening: tuple[Group, ...]
    epoch: int


@dataclass(frozen=True)
class AbortStreams:
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class ParkEngine:
    engine_id: str


@dataclass(frozen=True)
class WakeEngine:
    engine_id: str


@dataclass(frozen=True)
class KillEngine:
    """End its processes: it neither parked nor woke in time. Answered by EngineEnded."""

    engine_id: str


@dataclass(frozen=True)
class OpenGroups:
    """`groups` serve at `epoch`, `failed` have no engine yet; `gone` leave the table, their waiting work follows the others."""

    groups: tuple[Group, ...]
    failed: tuple[Group, ...]
    gone: tuple[Group, ...]
    epoch: int


Command = CloseGroups | AbortStreams | ParkEngine | WakeEngine | KillEngine | OpenGroups
