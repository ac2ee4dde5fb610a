"""GPUs, nodes, fleet: what there is, never what runs on it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Gpu:
    """One device of a node, or a declared slot where there is no hardware (type `slot`)."""

    index: int
    uuid: str
    type: str = "slot"
    memory_bytes: int = 0
    island: int = 0


@dataclass(frozen=True)
class Node:
    """One agent's GPUs. A TP group never crosses a node."""

    agent_id: str
    gpus: tuple[Gpu, ...]
    labels: tuple[tuple[str, str], ...] = ()
    legal_tp: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By model: what the agent read in its config."""
    _blocks: dict[int, tuple[tuple[Gpu, ...], ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Kept: planners ask for them with each plan."""

    def __post_init__(self) -> None:
        assert len({g.uuid for g in self.gpus}) == len(self.gpus), f"{self.agent_id}: a GPU twice"

    def blocks(self, size: int) -> tuple[tuple[Gpu, ...], ...]:
        """Aligned runs of `size` GPUs inside one island, by index: the only sets that a TP group may occupy, so that groups always pack."""
        if (found := self._blocks.get(size)) is None:
            ordered = sorted(self.gpus)
            runs = (tuple(ordered[i : i + size]) for i in range(0, len(ordered) - size + 1, size))
            found = self._blocks[size] = tuple(run for run in runs if len({g.island for g in run}) == 1)
        return found
