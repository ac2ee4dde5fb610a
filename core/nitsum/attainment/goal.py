"""What must be met, and how much of it is at a rate."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """`share` of the requests must meet both. None: no such target. `guest_ttft_ms`: of the tier that shares the group (`Group.guest`)."""

    ttft_ms: float | None
    tpot_ms: float | None
    share: float
    guest_ttft_ms: float | None = None


@dataclass(frozen=True)
class Point:
    """Where a group stands at a rate. `batch`: requests that decode at an instant, on average; `batch_stddev` over time."""

    ttft_share: float
    tpot_share: float
    batch: float
    batch_stddev: float
    busy: float
    """Share of the time that prefill takes."""
    limit: str = ""
    """KV or prefill, where the group cannot follow at all."""

    @property
    def share(self) -> float:
        return 0.0 if self.limit else self.ttft_share * self.tpot_share
