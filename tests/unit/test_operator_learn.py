"""What the operator makes of the step times that engines tell."""

from types import SimpleNamespace
from typing import Any

import pytest

from nitsum.perf.correction import Phase
from nitsum.perf.profile import load_shipped
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_operator import settings
from nitsum_operator.learn import Learning
from nitsum_operator.observe import Agent

PROFILE = load_shipped("tiny-llama.slot")
POOL = "a/p"


def accepted(profile: Any = PROFILE) -> Any:
    return {POOL: SimpleNamespace(pool=SimpleNamespace(name=POOL, model="tiny-llama"), profile=profile)}


def agent(
    serial: int, factor: float, tp_size: int = 1, batches: tuple[int, ...] = (1, 4, 8), state: int = types_pb2.GROUP_STATE_OPEN
) -> Agent:
    uuids = [f"g{i}" for i in range(tp_size)]
    group = types_pb2.Group(
        group_id="e", engine_id="e", pool=types_pb2.PoolRef(name=POOL), model="tiny-llama", tp_size=tp_size, gpu_uuids=uuids
    )
    report = agent_pb2.GroupReport(group=group, state=state, steps_serial=serial)  # type: ignore[arg-type]
    for b in batches:
        report.steps.add(phase="decode", batch=b, context=500, mean_ms=factor * PROFILE.decode_ms(tp_size, b, 500), count=20)
    return Agent("n1", agent_pb2.DescribeResponse(), agent_pb2.NodeReport(groups=[report]))


def test_a_machine_that_is_slower_than_its_profile_is_learned_and_the_plans_copy_moves_by_steps() -> None:
    learning, versions = Learning(True), set()
    for serial in range(1, 60):
        learning.hear([agent(serial, 1.5)], accepted())
        versions.add(learning.models[POOL].version)  # type: ignore[attr-defined]
    model = learning.models[POOL]
    assert model.decode_ms(1, 6, 500) == pytest.approx(1.5 * PROFILE.decode_ms(1, 6, 500), rel=0.07)
    assert model.decode_ms(2, 6, 500) > 1.2 * PROFILE.decode_ms(2, 6, 500), "what TP 2 does not know it borrows"
    assert model.kv_capacity_tokens(1, (1,)) == PROFILE.kv_capacity_tokens(1, (1,))
    assert 2 <= len(versions) < 15, "capacities are not computed anew each second"
    assert model.confidence(1, Phase.DECODE) > 0.5 > model.confidence(2, Phase.DECODE)  # type: ignore[attr-defined]
    assert model.origin.startswith("modelled, corrected by ")
    assert len(model.origin) <= 64


def test_the_same_measurement_counts_once() -> None:
    learning = Learning(True)
    for _ in range(50):
        learning.hear([agent(7, 1.5)], accepted())
    assert learning.models[POOL].steps == 3  # type: ignore[attr-defined]


def test_what_does_not_tell_of_the_model_as_it_serves_is_left_out() -> None:
    learning = Learning(True)
    learning.hear([agent(1, 1.5, state=types_pb2.GROUP_STATE_CLOSING)], accepted())
    learning.hear([agent(0, 1.5)], accepted())
    lost = agent(2, 1.5)
    lost.connected = False
    learning.hear([lost], accepted())
    learning.hear([agent(3, 1.5)], {})
    assert not learning.models
    learning.hear([agent(4, 1.5)], accepted())
    assert learning.models
    learning.hear([agent(4, 1.5)], accepted(load_shipped("smollm2-135m.slot")))
    assert not learning.models, "another profile has nothing to do with what was learned of the last one"


def test_correction_can_be_switched_off() -> None:
    assert settings.parse({}).online_correction
    assert not settings.parse({"profile": {"onlineCorrection": False}}).online_correction
    learning = Learning(False)
    learning.hear([agent(1, 1.5)], accepted())
    assert not learning.models
