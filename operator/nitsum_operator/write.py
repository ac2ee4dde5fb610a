"""Statuses to the API server: one patch per object and cycle, and only when something to be seen has changed."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from nitsum_api.resources import GROUP, NODES, POOLS, VERSION, PoolStatus
from nitsum_operator import nodes
from nitsum_operator.observe import Agent
from nitsum_operator.status import without_figures

FIGURES_S = 30.0
"""Measured figures alone are a reason to write at most this often."""


class Writer:
    def __init__(self, custom: client.CustomObjectsApi) -> None:
        self._custom = custom
        self._written: dict[str, dict[str, Any]] = {}
        """What was written last is newer than what the watch has brought back."""
        self._at: dict[str, float] = {}

    def before(self, key: str, obj: Mapping[str, Any]) -> dict[str, Any]:
        """The pool's status as it stands."""
        return self._written.get(key) or dict(obj.get("status") or {})

    async def pool(self, key: str, obj: Mapping[str, Any], status: PoolStatus) -> None:
        """Raises ApiException, but not where the pool has just been deleted."""
        old, new = self.before(key, obj), status.dump()
        if new == old:
            return
        recent = time.monotonic() - self._at.get(key, -FIGURES_S) < FIGURES_S
        if recent and without_figures(new) == without_figures(old):
            return
        patch = {"status": {**dict.fromkeys(set(old) - set(new)), **new}}
        namespace, _, name = key.partition("/")
        try:
            await asyncio.to_thread(self._custom.patch_namespaced_custom_object_status, GROUP, VERSION, namespace, POOLS, name, patch)
        except ApiException as e:
            if e.status != 404:
                raise
            return
        self._written[key], self._at[key] = new, time.monotonic()

    async def node(self, agent: Agent, now: str) -> None:
        key = f"node {agent.agent_id}"
        if key not in self._written:
            try:
                found = await asyncio.to_thread(self._custom.get_cluster_custom_object, GROUP, VERSION, NODES, agent.agent_id)
            except ApiException as e:
                if e.status != 404:
                    raise
                body = nodes.node_object(agent)
                found = await asyncio.to_thread(self._custom.create_cluster_custom_object, GROUP, VERSION, NODES, body)
            self._written[key] = found.get("status") or {}
        new = nodes.node_status(agent, self._written[key], now).dump()
        if new != self._written[key]:
            patch = {"status": new}
            await asyncio.to_thread(self._custom.patch_cluster_custom_object_status, GROUP, VERSION, NODES, agent.agent_id, patch)
            self._written[key] = new

    async def remove_node(self, agent_id: str) -> None:
        """Its Node is gone, and its agent with it."""
        try:
            await asyncio.to_thread(self._custom.delete_cluster_custom_object, GROUP, VERSION, NODES, agent_id)
        except ApiException as e:
            if e.status != 404:
                raise
        self._written.pop(f"node {agent_id}", None)

    def forget(self, keep: Iterable[str]) -> None:
        """Pools that are gone."""
        for gone in {k for k in self._written if not k.startswith("node ")} - set(keep):
            del self._written[gone]
            self._at.pop(gone, None)
