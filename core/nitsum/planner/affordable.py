"""What may come in this plan: no pool above its budget at any instant, so what it holds now counts until it is gone."""

from collections.abc import Iterable
from dataclasses import replace

from nitsum.planner.decided import Decided, as_placed
from nitsum.planner.place import Key, Placed
from nitsum.planner.types import Snapshot


class _Budget:
    """Of one pool, while nodes change one by one. On one node what ends does so before what comes wakes, so there the larger of the two
    counts; between nodes both do."""

    def __init__(self, d: Decided, snapshot: Snapshot) -> None:
        name = d.q.pool.name
        self.before = {n.node.agent_id: {g.gpu_uuids: g.tp_size for g in n.layout.groups if g.pool == name} for n in snapshot.nodes}
        self.held = {a: sum(groups.values()) for a, groups in self.before.items()}
        self.most = d.q.pool.budget_gpus - len(set(snapshot.holds.get(name, ())))
        self.total, self.after = sum(self.held.values()), dict.fromkeys(self.held, 0)

    def take(self, p: Placed) -> bool:
        new = self.after[p.agent_id] + len(p.gpus)
        more = max(new - max(self.held[p.agent_id], self.after[p.agent_id]), 0)
        if more and self.total + more > self.most:
            return False
        self.after[p.agent_id], self.total = new, self.total + more
        return True


def _groups(placed: Iterable[Placed]) -> list[Placed]:
    return [group for p in placed for group in p.groups()]


def affordable(decided: list[Decided], snapshot: Snapshot) -> tuple[list[Decided], dict[str, list[Placed]], set[Key]]:
    """What may come in this plan, group by group; by pool what must wait for the next one; and groups that stay as they are until then,
    since they would end now and nothing would follow."""
    found, waiting, stays = [], dict[str, list[Placed]](), set[Key]()
    budgets = {d.q.pool.name: _Budget(d, snapshot) for d in decided}
    for d in decided:
        budget = budgets[d.q.pool.name]
        ordered = sorted(_groups(d.placed), key=lambda p: (p.key[2] not in budget.before[p.agent_id], p.key))
        taken = [p for p in ordered if budget.take(p)]
        if len(taken) < len(ordered):
            kept = {p.key for p in taken}
            waiting[d.q.pool.name] = [p for p in ordered if p.key not in kept]
        found.append(replace(d, placed=tuple(taken)))
    if not waiting:
        return found, waiting, stays
    used = {u for d in found for p in d.placed for u in p.key[2]}
    for i, d in enumerate(found):
        nodes = {p.agent_id for p in waiting.get(d.q.pool.name, ())}
        mine = []
        for p in _groups(as_placed(d.q)) if nodes else ():
            if p.agent_id in nodes and not used & set(p.key[2]) and budgets[d.q.pool.name].take(p):
                used |= set(p.key[2])
                mine.append(p)
        if mine:
            stays |= {p.key for p in mine}
            found[i] = replace(d, placed=(*d.placed, *mine))
    return found, waiting, stays
