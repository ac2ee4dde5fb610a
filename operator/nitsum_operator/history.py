"""Flips as reports tell of them: each counted once, the last few kept with why they were wanted."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nitsum.layout import Layout
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.resources import FlipStatus
from nitsum_operator import status
from nitsum_operator.observe import Agent, layout_of

KEPT_MAX = 5


class History:
    """By pool. What an earlier leader counted and kept is in the pool's status, and is taken over from there."""

    def __init__(self) -> None:
        self.flip_at: dict[str, float] = {}
        """By agent: Unix seconds of its last flip's end."""
        self._layouts: dict[str, Layout] = {}
        """By agent: what stood when nothing was in progress."""
        self._seen: dict[str, tuple[str, int]] = {}
        self._last: dict[str, list[FlipStatus]] = {}
        self._total: dict[str, int] = {}

    def adopt(self, pool: str, before: Mapping[str, Any]) -> None:
        """From the status that an earlier leader wrote; only the first call of a pool has an effect."""
        if pool not in self._last:
            self._total[pool] = int(before.get("flips") or 0)
            self._last[pool] = [FlipStatus.model_validate(f) for f in before.get("lastFlips") or []][:KEPT_MAX]

    def last(self, pool: str) -> list[FlipStatus]:
        return self._last.get(pool, [])

    def total(self, pool: str) -> int:
        """Flips since the pool was created, those of earlier leaders included."""
        return self._total.get(pool, 0)

    def keep(self, pools: Iterable[str], agents: Collection[str]) -> None:
        """Forgets the others."""
        for by_agent in (self.flip_at, self._layouts, self._seen):
            for lost in set(by_agent) - set(agents):
                by_agent.pop(lost, None)
        for gone in set(self._last) - set(pools):
            self._last.pop(gone)
            self._total.pop(gone, None)

    def note(self, agent: Agent, reasons: Mapping[str, str], now: float) -> None:
        """`reasons`: by pool, why the plan wanted what it last asked for."""
        flip, mark = agent.report.flip, (agent.report.flip.operation_id, agent.report.flip.outcome)
        before, layout = self._layouts.get(agent.agent_id), layout_of(agent.report)
        if not agent.in_progress:
            self._layouts[agent.agent_id] = layout
        if before is None:
            self._seen[agent.agent_id] = mark  # of an earlier leader's time
        if self._seen.get(agent.agent_id) == mark or flip.outcome == agent_pb2.FlipReport.OUTCOME_RUNNING or before is None:
            return
        self._seen[agent.agent_id] = mark
        self.flip_at[agent.agent_id] = now
        for pool in {g.pool for g in layout.groups}:
            if not (old := status.layout_text(before, pool)):
                continue  # the first layout is no flip
            entry = FlipStatus(
                time=status.rfc3339(now),
                operation_id=flip.operation_id,
                agent_id=agent.agent_id,
                **{"from": old},
                to=status.layout_text(layout, pool),
                reason=reasons.get(pool, "")[:512] or None,
                outcome=status.OUTCOMES.get(flip.outcome, "Failed"),
                streams_moved=flip.streams_moved,
                pause_ms=round(sum(p.duration_ms for p in flip.phases)),
            )
            self._last[pool] = [entry, *self._last.get(pool, [])][:KEPT_MAX]
            self._total[pool] = self._total.get(pool, 0) + 1
