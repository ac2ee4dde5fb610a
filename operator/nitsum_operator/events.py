"""Kubernetes Events of pools: what `kubectl describe` shows of plans, flips and conditions that turn.

They are read off the status that was just written and the one before, so a new leader repeats none.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from nitsum_api.conditions import EventReason, PoolCondition
from nitsum_api.resources import API_VERSION, POOL_KIND
from nitsum_operator.write import Written

BURST = 16
"""Of one pool, at once; past it one in REFILL_S. What comes too fast is left out: the status has it all."""
REFILL_S = 30.0
AT_ONCE = 32
"""Posted in one cycle at most; the others follow in the next ones."""
WAITING_MAX = 1024
"""Past it the oldest of those that wait are left out."""
NOTE_MAX = 1024
NAME_MAX = 200
REPORTER = "nitsum.io/operator"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    reason: str
    note: str
    warning: bool = False
    action: str = "Observe"


def news(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Said]:
    """What is worth an Event in the step from one status to the next. Pure."""
    return [*_conditions(old, new), *_plan(old, new), *_flips(old, new)]


def _conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Said]:
    before = {c["type"]: c for c in old.get("conditions") or []}
    found = []
    for c in new.get("conditions") or []:
        was = before.get(c["type"], {})
        turned = was.get("status") != c["status"]
        match c["type"], c["status"]:
            case PoolCondition.ACCEPTED, "False" if turned or was.get("message") != c["message"]:
                found.append(Said(c["reason"], c["message"], True))
            case PoolCondition.ACCEPTED, "True" if turned or was.get("observedGeneration") != c["observedGeneration"]:
                found.append(Said(c["reason"], c["message"]))
            case PoolCondition.READY, "True" if turned:
                found.append(Said(c["reason"], c["message"]))
            case PoolCondition.READY, "False" if was.get("status") == "True":
                found.append(Said(c["reason"], c["message"], True))
            case PoolCondition.DEGRADED, "True" if turned or was.get("reason") != c["reason"]:
                found.append(Said(c["reason"], c["message"], True))
            case PoolCondition.DEGRADED, "False" if was.get("status") == "True":
                found.append(Said(c["reason"], c["message"]))
    return found


def _plan(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Said]:
    plan = new.get("plan") or {}
    if not plan.get("layout") or plan.get("id") == (old.get("plan") or {}).get("id"):
        return []
    return [Said(EventReason.LAYOUT_PLANNED, f"{plan['layout']}: {(plan.get('reasons') or [''])[-1]}", action="Plan")]


def _flips(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Said]:
    """The oldest first."""
    known = [(f.get("operationId"), f.get("agentId")) for f in old.get("lastFlips") or []]
    found = []
    for f in reversed(new.get("lastFlips") or []):
        if (f.get("operationId"), f.get("agentId")) in known:
            continue
        done = f.get("outcome") == "Done"
        moved = f"{f.get('streamsMoved', 0)} streams moved, {f.get('pauseMs', 0)} ms"
        note = (
            f"{f.get('agentId')}: {f.get('from')} -> {f.get('to')}, {moved}" if done else f"{f.get('agentId')}: {f.get('outcome')}, {moved}"
        )
        found.append(Said(EventReason.FLIPPED if done else EventReason.FLIP_FAILED, note, not done, "Flip"))
    return found


@dataclass
class _Allowance:
    at: float
    left: float = BURST

    def take(self, now: float) -> bool:
        self.left, self.at = min(self.left + (now - self.at) / REFILL_S, BURST), now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Events:
    """Posts what `news` finds. An Event that cannot be posted is logged and forgotten."""

    def __init__(self, api: client.EventsV1Api, instance: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._instance, self._clock = api, instance[:128], clock
        self._allowed: dict[str, _Allowance] = {}
        self._waiting: deque[dict[str, Any]] = deque(maxlen=WAITING_MAX)

    async def post(self, written: Iterable[Written]) -> None:
        now = self._clock()
        for obj, old, new in written:
            meta = obj["metadata"]
            allowance = self._allowed.setdefault(f"{meta['namespace']}/{meta['name']}", _Allowance(now))
            self._waiting.extend(self._body(meta, s) for s in news(old, new) if allowance.take(now))
        if bodies := [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]:
            await asyncio.to_thread(self._post, bodies)

    def keep(self, pools: Collection[str]) -> None:
        """Forgets the others."""
        self._allowed = {k: a for k, a in self._allowed.items() if k in pools}

    def _body(self, meta: Mapping[str, Any], said: Said) -> dict[str, Any]:
        regarding = {"apiVersion": API_VERSION, "kind": POOL_KIND, "name": meta["name"], "namespace": meta["namespace"]}
        if meta.get("uid"):
            regarding["uid"] = meta["uid"]
        return {
            "metadata": {"name": f"{meta['name'][:NAME_MAX].rstrip('-.')}.{uuid.uuid4().hex[:16]}", "namespace": meta["namespace"]},
            "eventTime": datetime.now(UTC).isoformat(),
            "type": "Warning" if said.warning else "Normal",
            "reason": str(said.reason),
            "action": said.action,
            "note": said.note[:NOTE_MAX],
            "regarding": regarding,
            "reportingController": REPORTER,
            "reportingInstance": self._instance,
        }

    def _post(self, bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            namespace, name = body["metadata"]["namespace"], body["regarding"]["name"]
            try:
                self._api.create_namespaced_event(namespace, body)
            except ApiException as e:  # of this one: its namespace is being deleted, or takes no more
                log.warning("Event %s of %s/%s: %s %s", body["reason"], namespace, name, e.status, (e.body or "")[:300])
            except HTTPError as e:
                log.warning("Events: the API server cannot be reached: %s", e)
                return
