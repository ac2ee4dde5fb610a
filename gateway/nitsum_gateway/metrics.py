"""What fronts report, for Prometheus. Only this process loads prometheus_client: a zygote that has must not fork."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from nitsum_api.gateway.v1 import gateway_pb2

REGISTRY = CollectorRegistry()
LABELS = ("pool", "tier")
COUNTERS = {
    "arrivals": "Requests that reached a router.",
    "finished": "Requests that ended with stop or length.",
    "met_all": "Finished requests that met every target of their tier.",
    "met_ttft": "Finished requests that met the time to first token.",
    "met_tpot": "Finished requests that met the time per output token.",
    "refused": "Requests answered 429.",
    "failed": "Requests that failed for no fault of the client.",
    "moves": "Times that a stream went on on another group.",
}
_counters = {name: Counter(f"nitsum_gateway_{name}", text, LABELS, registry=REGISTRY) for name, text in COUNTERS.items()}
_tokens = {
    name: Counter(f"nitsum_gateway_{name}", f"Sum of {name.replace('_', ' ')}.", LABELS, registry=REGISTRY)
    for name in ("prompt_tokens", "output_tokens")
}
_in_flight = Gauge("nitsum_gateway_in_flight", "Requests in flight.", LABELS, registry=REGISTRY)


def observe(report: gateway_pb2.DemandReport) -> None:
    for row in report.tiers:
        for name, counter in _counters.items():
            counter.labels(row.pool.name, row.tier).inc(getattr(row, name))
        for name, counter in _tokens.items():
            counter.labels(row.pool.name, row.tier).inc(getattr(row, name).sum)
        _in_flight.labels(row.pool.name, row.tier).set(row.in_flight)


async def expose(request: Request) -> Response:
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
