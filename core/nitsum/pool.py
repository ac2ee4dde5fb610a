"""A ServingPool's spec as the planner sees it: tiers, budget, allowed TP, adaptation mode."""

from dataclasses import dataclass
from enum import StrEnum


class AdaptationMode(StrEnum):
    """Advisory and Frozen route, admit and repair, but never change a layout once there is one; Advisory also says what it would do."""

    ACTIVE = "Active"
    ADVISORY = "Advisory"
    FROZEN = "Frozen"


@dataclass(frozen=True)
class Tier:
    """One class of traffic. A target of None: the tier has no such SLO; with neither it is background."""

    name: str
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    target: float = 0.95
    weight: float = 1.0
    default: bool = False

    @property
    def background(self) -> bool:
        return self.ttft_ms is None and self.tpot_ms is None


@dataclass(frozen=True)
class Pool:
    """One accepted ServingPool. `name` is `namespace/name`; `model` is what clients put in `model`.

    `checkpoint`: a short digest of what is loaded and from where, so that engines of a changed one are not taken for engines of this one.
    """

    name: str
    uid: str
    model: str
    tiers: tuple[Tier, ...]
    budget_gpus: int
    node_selector: tuple[tuple[str, str], ...] = ()
    allowed_tp: tuple[int, ...] = ()
    profile: str = ""
    mode: AdaptationMode = AdaptationMode.ACTIVE
    checkpoint: str = ""

    def __post_init__(self) -> None:
        assert self.budget_gpus >= 0
        assert len({t.name for t in self.tiers}) == len(self.tiers)

    @property
    def default_tier(self) -> Tier:
        """The one marked default, else the first with an SLO, else the first."""
        marked = [t for t in self.tiers if t.default]
        return (marked or [t for t in self.tiers if not t.background] or list(self.tiers))[0]

    def tier(self, name: str) -> Tier | None:
        return next((t for t in self.tiers if t.name == name), None)
