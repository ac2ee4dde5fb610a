"""What the API server tells: kopf keeps an index of pools and nodes. No finalizers, no annotations: it only watches."""

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

import kopf

from nitsum_api.resources import GROUP, POOLS, VERSION

OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
"""The taint by which people say that a lost node holds nothing any more."""


DRAIN = "nitsum.io/drain"
"""The taint by which people empty a node that works, e.g. `kubectl taint node n nitsum.io/drain=:NoSchedule`; it comes back without it."""


class Store:
    """Newest body of every pool, the labels of every node, and which nodes are tainted or cordoned."""

    def __init__(self) -> None:
        self.pools: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, str]] = {}
        self.out_of_service: set[str] = set()
        self.cordoned: set[str] = set()
        self.draining: set[str] = set()
        self.events = 0
        """Grows with everything that the watches bring: what was listed before is older."""

    def saw_pool(self, key: str, body: dict[str, Any] | None) -> None:
        self.events += 1
        if body is None:
            self.pools.pop(key, None)
        else:
            self.pools[key] = body

    def saw_node(self, name: str, labels: Mapping[str, str], taints: Iterable[str], cordoned: bool = False) -> None:
        self.lost_node(name)
        self.nodes[name] = dict(labels)
        taints = set(taints)
        if OUT_OF_SERVICE in taints:
            self.out_of_service.add(name)
        if DRAIN in taints:
            self.draining.add(name)
        if cordoned:
            self.cordoned.add(name)

    def lost_node(self, name: str) -> None:
        self.events += 1
        self.nodes.pop(name, None)
        self.out_of_service.discard(name)
        self.cordoned.discard(name)
        self.draining.discard(name)

    @property
    def highest_term(self) -> int:
        """That an operator has written to a pool's status."""
        return max((int((p.get("status") or {}).get("term") or 0) for p in self.pools.values()), default=0)

    def may_hold(self, name: str) -> bool:
        """Whether GPUs of a node that does not answer count as used: until it is deleted, or tainted out of service."""
        return name in self.nodes and name not in self.out_of_service


def register(store: Store) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        found = kopf.login_with_kubeconfig(**kwargs) if os.environ.get("KUBECONFIG") else kopf.login_with_service_account(**kwargs)
        return found if isinstance(found, kopf.ConnectionInfo) else None

    @kopf.on.event(GROUP, VERSION, POOLS, registry=registry)
    async def pool(event: Any, body: Any, name: str, namespace: str | None, **_: Any) -> None:
        key = f"{namespace}/{name}"
        store.saw_pool(key, None if event["type"] == "DELETED" else copy.deepcopy(dict(body)))

    @kopf.on.event("", "v1", "nodes", registry=registry)
    async def node(event: Any, name: str | None, labels: Any, spec: Any, **_: Any) -> None:
        if event["type"] == "DELETED":
            store.lost_node(str(name))
        else:
            store.saw_node(str(name), labels, [t.get("key", "") for t in spec.get("taints") or []], bool(spec.get("unschedulable")))

    return registry
