"""What the demo sees of the system while it runs: the pool's status, as any user of `kubectl` sees it."""

import asyncio
from typing import Any

from kubernetes import client
from urllib3.exceptions import HTTPError

from nitsum.pool import AdaptationMode
from nitsum_api.resources import GROUP, NODES, POOLS, VERSION

POLL_S = 0.5


class PoolWatch:
    """`status` is refreshed twice a second while `run()` runs."""

    def __init__(self, api: Any, namespace: str, name: str) -> None:
        self._custom, self.namespace, self.name = client.CustomObjectsApi(api), namespace, name
        self.status: dict[str, Any] = {}

    async def run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> None:
        """An API server that does not answer leaves the last status."""
        try:
            found = await asyncio.to_thread(
                self._custom.get_namespaced_custom_object, GROUP, VERSION, self.namespace, POOLS, self.name, _request_timeout=5
            )
        except (client.ApiException, HTTPError):
            return
        self.status = found.get("status") or {}

    async def engines(self) -> tuple[int, int]:
        """Of this pool, as ServingNodes show them: ready (parked or awake), and in all. (0, 0) where the API server does not answer."""
        try:
            found = await asyncio.to_thread(self._custom.list_cluster_custom_object, GROUP, VERSION, NODES, _request_timeout=5)
        except (client.ApiException, HTTPError):
            return 0, 0
        engines = [e for n in found["items"] for e in (n.get("status") or {}).get("engines") or []]
        states = [e.get("state") for e in engines if e["id"].startswith(f"{self.namespace}.{self.name}-tp")]
        return sum(s in ("Parked", "Awake") for s in states), len(states)

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status.get("conditions") or [] if c["type"] == kind), {})

    @property
    def ready(self) -> bool:
        return self.condition("Ready").get("status") == "True"

    @property
    def flips(self) -> int:
        return int(self.status.get("flips") or 0)

    @property
    def settled(self) -> bool:
        """Serves, and no flip runs."""
        return self.ready and self.condition("Progressing").get("status") != "True"


async def create_pool(api: Any, namespace: str, manifest: dict[str, Any]) -> None:
    """Raises ApiException with the server's own words where it is refused."""
    custom = client.CustomObjectsApi(api)
    await asyncio.to_thread(custom.create_namespaced_custom_object, GROUP, VERSION, namespace, POOLS, manifest, _request_timeout=10)


async def change_pool(api: Any, namespace: str, name: str, spec: dict[str, Any]) -> None:
    """A merge patch of the spec. Raises ApiException."""
    custom, patch = client.CustomObjectsApi(api), {"spec": spec}
    await asyncio.to_thread(custom.patch_namespaced_custom_object, GROUP, VERSION, namespace, POOLS, name, patch, _request_timeout=10)


async def set_mode(api: Any, namespace: str, name: str, mode: AdaptationMode) -> None:
    """Frozen: no layout changes any more; routing and repair go on."""
    await change_pool(api, namespace, name, {"adaptation": {"mode": str(mode)}})
