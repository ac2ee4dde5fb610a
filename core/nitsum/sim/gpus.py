"""Whose engine is awake on which GPU, what stood where when, and the invariants of both."""

from collections import Counter
from collections.abc import Collection

from nitsum.sim.group import Key, SimGroup
from nitsum.sim.node import SimNode
from nitsum.sim.result import LayoutAt


class Gpus:
    def __init__(self, nodes: Collection[SimNode], budget: int) -> None:
        self.nodes, self.budget = nodes, budget
        self.groups: list[SimGroup] = []
        """Open ones in order, for round robin."""
        self.layouts: list[LayoutAt] = []
        self.most = 0
        self.changed = False
        """Since the last record."""
        self._awake: dict[str, Key] = {}

    def wake(self, g: SimGroup) -> None:
        for uuid in g.group.gpu_uuids:
            assert uuid not in self._awake, f"two engines awake on {uuid}: {g.key}, {self._awake[uuid]}"
            self._awake[uuid] = g.key
        g.open = self.changed = True
        self.groups.append(g)

    def sleep(self, g: SimGroup) -> None:
        for uuid in g.group.gpu_uuids:
            assert self._awake[uuid] == g.key, (uuid, g.key)
            del self._awake[uuid]
        g.open, self.changed = False, True
        self.groups.remove(g)

    def record(self, now: float) -> None:
        self.changed = False
        gpus: Counter[tuple[int, tuple[str, ...]]] = Counter()
        for n in self.nodes:
            for g in n.all_groups():
                if g.open:
                    gpus[g.group.tp_size, tuple(sorted(g.tiers))] += g.group.tp_size
                else:
                    gpus[0, ()] += sum(u not in self._awake for u in g.group.gpu_uuids)
        rows = tuple((tp, tiers, count) for (tp, tiers), count in sorted(gpus.items()) if count)
        if self.layouts and self.layouts[-1].at == now:
            self.layouts.pop()
        if not self.layouts or self.layouts[-1].gpus != rows:
            self.layouts.append(LayoutAt(now, rows))

    def check(self) -> None:
        """GPUs in use, by engines awake or about to be; that no two are awake on one is checked as they wake."""
        used = 0
        for n in self.nodes:
            uuids = [u for g in n.groups.values() for u in g.group.gpu_uuids]
            assert len(set(uuids)) == len(uuids), f"{n.node.agent_id}: a GPU twice"
            held = {*uuids, *(u for g in n.ending.values() for u in g.group.gpu_uuids)}
            assert held <= {g.uuid for g in n.node.gpus}, f"{n.node.agent_id}: foreign GPUs"
            used += len(held)
        assert used <= self.budget, f"{used} GPUs in use, the budget is {self.budget}"
        self.most = max(self.most, used)
