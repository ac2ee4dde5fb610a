"""What a stream is told, and what it answers."""

from dataclasses import dataclass

from nitsum.routing.view import AdmissionClass

# What happened to a stream


@dataclass(frozen=True)
class Tokens:
    """From the submission `hop`; older hops are ignored."""

    hop: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    hop: int


@dataclass(frozen=True)
class Moved:
    """Its group ended under it, or refused it as moved. Successors are group keys, best first."""

    hop: int
    successors: tuple[tuple[tuple[str, str], int], ...] = ()


@dataclass(frozen=True)
class Refused:
    hop: int
    retry_after_ms: int = 0
    fatal: str = ""
    """Why no other group would take it either."""
    status: int = 400
    """HTTP status of a fatal one."""


@dataclass(frozen=True)
class Crashed:
    """Its engine died with it aboard."""

    hop: int


@dataclass(frozen=True)
class NodeLost:
    """The line to its node broke; the engine may be well."""

    hop: int


@dataclass(frozen=True)
class Retried:
    """Time has passed since no group took it."""


@dataclass(frozen=True)
class ClientGone:
    pass


Event = Tokens | Finished | Moved | Refused | Crashed | NodeLost | Retried | ClientGone


# What to do about it


@dataclass(frozen=True)
class Submit:
    """prompt + `resume` generated tokens to this group."""

    hop: int
    group: tuple[str, str]
    epoch: int
    admission: AdmissionClass
    resume: int
    suspect: bool


@dataclass(frozen=True)
class Deliver:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Retry:
    after_s: float


@dataclass(frozen=True)
class Abort:
    hop: int
    group: tuple[str, str]


@dataclass(frozen=True)
class Fail:
    """To the client: an HTTP status and a message."""

    status: int
    message: str
    retry_after_ms: int = 0


@dataclass(frozen=True)
class Done:
    pass


Command = Submit | Deliver | Retry | Abort | Fail | Done
