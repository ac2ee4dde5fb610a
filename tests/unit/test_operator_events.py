"""Events: what is worth one, and that there are not too many."""

from typing import Any

from kubernetes.client.exceptions import ApiException

from nitsum_operator.events import AT_ONCE, BURST, WAITING_MAX, Events, Said, news


def row(kind: str, status: str, reason: str, message: str = "m", generation: int = 1) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "observedGeneration": generation}


def told(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(s.reason, s.warning) for s in news(old, new)]


STARTING = {"conditions": [row("Accepted", "Unknown", "ModelFactsPending"), row("Ready", "False", "NotAccepted")]}
SERVING = {
    "conditions": [row("Accepted", "True", "Accepted"), row("Ready", "True", "Serving"), row("Degraded", "False", "Healthy")],
    "plan": {"id": "p1", "layout": "2xTP1", "reasons": ["profile x", "first layout: 2xTP1"]},
}


def test_conditions_that_turn_are_told_once() -> None:
    assert told({}, STARTING) == [], "a start is no news"
    assert told(STARTING, SERVING) == [("Accepted", False), ("Serving", False), ("LayoutPlanned", False)]
    assert told(SERVING, SERVING) == []
    bad = [row("Accepted", "False", "IllegalTensorParallel", generation=2), row("Ready", "False", "EnginesFailed")]
    ill = {**SERVING, "conditions": [*bad, row("Degraded", "True", "AgentLost")]}
    assert told(SERVING, ill) == [("IllegalTensorParallel", True), ("EnginesFailed", True), ("AgentLost", True)]
    assert told(ill, SERVING) == [("Accepted", False), ("Serving", False), ("Healthy", False)]
    again = {"conditions": [row("Accepted", "True", "Accepted", generation=2)]}
    assert told(SERVING, again) == [("Accepted", False)], "another spec is in force"


def test_a_plan_is_told_when_its_layout_changes() -> None:
    other = {**SERVING, "plan": {"id": "p2", "layout": "1xTP2", "reasons": ["profile x", "2xTP1 -> 1xTP2: because"]}}
    assert news(SERVING, other) == [Said("LayoutPlanned", "1xTP2: 2xTP1 -> 1xTP2: because", action="Plan")]
    gone = {**SERVING, "plan": {"id": "p3", "reasons": ["no GPU"]}}
    assert news(SERVING, gone) == [], "conditions say that"


def test_each_flip_is_told_once_the_oldest_first() -> None:
    flips = [
        {"operationId": f"o{i}", "agentId": "n1", "from": "2xTP1", "to": "1xTP2", "outcome": outcome, "streamsMoved": i, "pauseMs": 300}
        for i, outcome in ((3, "Reverted"), (2, "Done"), (1, "Done"))
    ]
    old, new = {**SERVING, "lastFlips": flips[2:]}, {**SERVING, "lastFlips": flips}
    assert [(s.reason, s.note, s.warning) for s in news(old, new)] == [
        ("Flipped", "n1: 2xTP1 -> 1xTP2, 2 streams moved, 300 ms", False),
        ("FlipFailed", "n1: Reverted, 3 streams moved, 300 ms", True),
    ]


class Api:
    def __init__(self, status: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status = status

    def create_namespaced_event(self, namespace: str, body: dict[str, Any]) -> None:
        if self.status:
            raise ApiException(status=self.status)
        assert namespace == body["metadata"]["namespace"] == body["regarding"]["namespace"]
        self.bodies.append(body)


async def test_what_comes_too_fast_is_left_out() -> None:
    clock = 7.0
    api: Any = Api()
    posted = Events(api, "holder", lambda: clock)
    pool = {"metadata": {"namespace": "a", "name": "p" * 250, "uid": "u"}}
    ill = {"conditions": [row("Degraded", "True", "AgentLost", "x" * 5000)]}
    for _ in range(50):
        await posted.post([(pool, SERVING, ill)])
    assert len(api.bodies) == BURST
    assert len(api.bodies[0]["note"]) == 1024
    assert len(api.bodies[0]["metadata"]["name"]) <= 253
    assert len({b["metadata"]["name"] for b in api.bodies}) == BURST
    clock += 61.0
    for _ in range(50):
        await posted.post([(pool, SERVING, ill)])
    assert len(api.bodies) == BURST + 2
    posted.keep([])
    await posted.post([(pool, SERVING, ill)])
    assert len(api.bodies) == BURST + 3, "a pool of that name which was made anew"


async def test_a_cycle_posts_only_so_many() -> None:
    api: Any = Api()
    posted = Events(api, "holder")
    pools = [{"metadata": {"namespace": "a", "name": f"p{i}"}} for i in range(30)]
    await posted.post([(p, {}, SERVING) for p in pools])
    assert len(api.bodies) == AT_ONCE
    await posted.post([])
    await posted.post([])
    assert len(api.bodies) == 3 * len(pools) == 90
    assert {b["regarding"]["name"] for b in api.bodies} == {p["metadata"]["name"] for p in pools}
    await posted.post([])
    assert len(api.bodies) == 90
    api.bodies.clear()
    await posted.post([({"metadata": {"namespace": "a", "name": f"q{i}"}}, {}, SERVING) for i in range(1000)])
    for _ in range(100):
        await posted.post([])
    assert len(api.bodies) == WAITING_MAX, "memory is bounded"


async def test_an_event_that_is_refused_stops_nothing() -> None:
    api: Any = Api(403)
    await Events(api, "h").post([({"metadata": {"namespace": "a", "name": "p"}}, {}, SERVING)])
