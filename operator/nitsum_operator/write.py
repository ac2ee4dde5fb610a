"""Statuses to the API server: one patch per object and cycle, and only when something to be seen has changed."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from nitsum_api.resources import GROUP, NODES, POOLS, VERSION, PoolStatus
from nitsum_operator import nodes
from nitsum_operator.observe import Agent
from nitsum_operator.status import without_figures

FIGURES_S = 30.0
"""Measured figures alone are a reason to write at most this often."""
REFUSED = (400, 403, 413, 422)
"""Of one object: no reason to stop work on the others."""
log = logging.getLogger(__name__)


Written = tuple[Mapping[str, Any], dict[str, Any], dict[str, Any]]
"""A pool, its status before and after."""


@dataclass
class _Last:
    """`older`: versions of the object that the watch may still show although this status is newer."""

    status: dict[str, Any]
    version: str
    older: frozenset[str]


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7396, from `old` to `new`: what is gone is null, at every depth."""
    gone: dict[str, Any] = dict.fromkeys(set(old) - set(new))
    return gone | {k: merge_patch(old[k], v) if isinstance(v, dict) and isinstance(old.get(k), dict) else v for k, v in new.items()}


class Writer:
    def __init__(self, custom: client.CustomObjectsApi) -> None:
        self._custom = custom
        self._pools: dict[str, _Last] = {}
        self._written: list[Written] = []
        self._nodes: dict[str, dict[str, Any]] = {}
        self._at: dict[str, float] = {}
        self._refused: dict[str, str] = {}

    def before(self, key: str, obj: Mapping[str, Any]) -> dict[str, Any]:
        """The pool's status as it stands. What was written last, until the watch shows that or something newer."""
        written = self._pools.get(key)
        if written is not None and obj["metadata"].get("resourceVersion") in written.older:
            return written.status
        self._pools.pop(key, None)
        return dict(obj.get("status") or {})

    async def pool(self, key: str, obj: Mapping[str, Any], status: PoolStatus) -> bool:
        """False where the pool has changed since `obj`, is gone, or a newer leader wrote: what was planned with it is out of date."""
        old, new = self.before(key, obj), status.dump()
        if (old.get("term") or 0) > (status.term or 0):
            return False
        if new == old:
            return True
        recent = time.monotonic() - self._at.get(key, -FIGURES_S) < FIGURES_S
        if recent and without_figures(new) == without_figures(old):
            return True
        seen, written = obj["metadata"].get("resourceVersion", ""), self._pools.get(key)
        version = written.version if written is not None else seen
        patch = {"metadata": {"resourceVersion": version}, "status": merge_patch(old, new)}
        namespace, _, name = key.partition("/")
        call = self._custom.patch_namespaced_custom_object_status
        try:
            found = await asyncio.to_thread(call, GROUP, VERSION, namespace, POOLS, name, patch)
        except ApiException as e:
            if e.status not in (404, 409, *REFUSED):
                raise
            self._pools.pop(key, None)
            if e.status in REFUSED:
                self._note(key, e)
            return e.status in REFUSED
        older = {seen, version, *(written.older if written is not None else ())}
        self._written.append((obj, old, new))
        self._pools[key] = _Last(new, found["metadata"]["resourceVersion"], frozenset(older))
        self._at[key] = time.monotonic()
        self._refused.pop(key, None)
        return True

    def take(self) -> list[Written]:
        """Statuses of pools written since the last call."""
        found, self._written = self._written, []
        return found

    async def node(self, agent: Agent, now: str) -> bool:
        """True where it called the API server."""
        agent_id = agent.agent_id
        known = agent_id in self._nodes
        try:
            if not known:
                self._nodes[agent_id] = await asyncio.to_thread(self._found, agent)
            new = nodes.node_status(agent, self._nodes[agent_id], now).dump()
            if new == self._nodes[agent_id]:
                return not known
            await asyncio.to_thread(self._custom.patch_cluster_custom_object_status, GROUP, VERSION, NODES, agent_id, {"status": new})
            self._nodes[agent_id] = new
        except ApiException as e:
            if e.status not in (404, 409, *REFUSED):
                raise
            self._nodes.pop(agent_id, None)
            if e.status in REFUSED:
                self._note(f"node {agent_id}", e)
        return True

    def _found(self, agent: Agent) -> dict[str, Any]:
        get: Callable[..., dict[str, Any]] = self._custom.get_cluster_custom_object
        try:
            return get(GROUP, VERSION, NODES, agent.agent_id).get("status") or {}
        except ApiException as e:
            if e.status != 404:
                raise
        create: Callable[..., dict[str, Any]] = self._custom.create_cluster_custom_object
        return create(GROUP, VERSION, NODES, nodes.node_object(agent)).get("status") or {}

    def saw_nodes(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """As listed just now: what people changed or deleted is written anew."""
        listed = {o["metadata"]["name"]: dict(o.get("status") or {}) for o in objects}
        self._nodes = {k: listed[k] for k in self._nodes if k in listed}

    async def remove_node(self, agent_id: str) -> None:
        """Its Node is gone, and its agent with it."""
        try:
            await asyncio.to_thread(self._custom.delete_cluster_custom_object, GROUP, VERSION, NODES, agent_id)
        except ApiException as e:
            if e.status != 404:
                raise
        self._nodes.pop(agent_id, None)

    def _note(self, key: str, e: ApiException) -> None:
        text = (e.body or "")[:500]
        if self._refused.get(key) != text:
            log.error("the API server refused the status of %s: %s %s", key, e.status, text)
        self._refused[key] = text

    def forget(self, keep: Iterable[str]) -> None:
        """Pools that are gone."""
        keep = set(keep)
        self._pools = {k: w for k, w in self._pools.items() if k in keep}
        self._at = {k: t for k, t in self._at.items() if k in keep}
