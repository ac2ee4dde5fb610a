"""What the API server tells: kopf keeps an index of pools and nodes. No finalizers, no annotations: it only watches."""

import copy
import os
from typing import Any

import kopf

from nitsum_api.resources import GROUP, POOLS, VERSION


class Store:
    """Newest body of every pool and the labels of every node."""

    def __init__(self) -> None:
        self.pools: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, str]] = {}


def register(store: Store) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        found = kopf.login_with_kubeconfig(**kwargs) if os.environ.get("KUBECONFIG") else kopf.login_with_service_account(**kwargs)
        return found if isinstance(found, kopf.ConnectionInfo) else None

    @kopf.on.event(GROUP, VERSION, POOLS, registry=registry)
    async def pool(event: Any, body: Any, name: str, namespace: str | None, **_: Any) -> None:
        key = f"{namespace}/{name}"
        if event["type"] == "DELETED":
            store.pools.pop(key, None)
        else:
            store.pools[key] = copy.deepcopy(dict(body))

    @kopf.on.event("", "v1", "nodes", registry=registry)
    async def node(event: Any, name: str | None, labels: Any, **_: Any) -> None:
        if event["type"] == "DELETED":
            store.nodes.pop(str(name), None)
        else:
            store.nodes[str(name)] = dict(labels)

    return registry
