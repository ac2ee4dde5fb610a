"""A simulated node: its groups, and the flip under way."""

from dataclasses import dataclass, field

from nitsum.layout import Group, Layout
from nitsum.onward import Onward
from nitsum.planner import NodePlan, NodeView
from nitsum.residency import Residency
from nitsum.sim.group import Key, SimGroup
from nitsum.topology import Node


@dataclass(eq=False)
class SimNode:
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

    def all_groups(self) -> tuple[SimGroup, ...]:
        return (*self.groups.values(), *self.ending.values())

    def successors(self, ended: Group | None) -> tuple[tuple[Key, int], ...]:
        """Where the streams of a group that has ended go."""
        if ended is None:
            return tuple((g.key, g.epoch) for _, g in sorted(self.groups.items()))
        return tuple((self.groups[g.group_id].key, self.groups[g.group_id].epoch) for g in self.layout.successors(ended))

    def view(self, now: float) -> NodeView:
        """As its agent would report it now."""
        tokens = {g.group.group_id: g.engine.resident_at(now) for g in self.all_groups()}
        return NodeView(self.node, self.residency, self.layout, tokens, self.wanted is not None, True, self.flipped_at)
