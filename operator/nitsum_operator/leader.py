"""Leadership: one Lease, taken and renewed by compare-and-swap on resourceVersion; its annotation holds the highest term given out."""

from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

LEASE = "nitsum-operator"
DURATION_S = 15
TERM = "nitsum.io/term"


def next_term(annotated: int, seen: int) -> int:
    """Above every term that was ever given out or seen by a peer."""
    return max(annotated, seen) + 1


class Leader:
    """Blocking; call it in a thread. `term` is 0 while another one leads."""

    def __init__(self, coordination: Any, namespace: str, holder: str) -> None:
        self._api, self._namespace, self._holder = coordination, namespace, holder
        self.term = 0

    def hold(self, seen_term: int) -> int:
        """Takes or renews the Lease. Returns the term, 0 when another holder's lease is valid or a write lost its race."""
        now = datetime.now(UTC)
        try:
            lease = self._api.read_namespaced_lease(LEASE, self._namespace)
        except ApiException as e:
            if e.status != 404:
                raise
            lease = None
        if lease is not None and lease.spec.holder_identity not in (None, "", self._holder):
            renewed = lease.spec.renew_time
            if renewed is not None and now < renewed + timedelta(seconds=lease.spec.lease_duration_seconds or DURATION_S):
                self.term = 0
                return 0
        annotated = int(((lease.metadata.annotations if lease else None) or {}).get(TERM, 0))
        mine = lease is not None and lease.spec.holder_identity == self._holder and self.term > 0
        term = self.term if mine and self.term >= seen_term else next_term(annotated, seen_term)
        acquired = lease.spec.acquire_time if lease is not None and mine else now
        body = client.V1Lease(
            metadata=client.V1ObjectMeta(
                name=LEASE,
                namespace=self._namespace,
                annotations={TERM: str(term)},
                resource_version=lease.metadata.resource_version if lease else None,
            ),
            spec=client.V1LeaseSpec(holder_identity=self._holder, lease_duration_seconds=DURATION_S, acquire_time=acquired, renew_time=now),
        )
        try:
            if lease is None:
                self._api.create_namespaced_lease(self._namespace, body)
            else:
                self._api.replace_namespaced_lease(LEASE, self._namespace, body)
        except ApiException as e:
            if e.status != 409:
                raise
            self.term = 0
            return 0
        self.term = term
        return term

    def release(self) -> None:
        """On a clean stop: the next one need not wait."""
        if not self.term:
            return
        lease = self._api.read_namespaced_lease(LEASE, self._namespace)
        if lease.spec.holder_identity == self._holder:
            lease.spec.holder_identity = ""
            self._api.replace_namespaced_lease(LEASE, self._namespace, lease)
        self.term = 0
