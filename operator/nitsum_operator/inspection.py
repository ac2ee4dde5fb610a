"""What agents find where specs say that a model is, asked for before a spec is judged. Off the cycle: the next one sees the answers."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc

from nitsum.errors import InvalidSpec
from nitsum.pool import Pool
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.resources import ModelSpec, pool_from_resource
from nitsum_api.types.v1 import types_pb2
from nitsum_operator.observe import Agent

CALL_S = 10.0
RETRY_S = 10.0
"""Where an agent did not answer, or named a problem that people may have mended since."""
AT_ONCE = 32
log = logging.getLogger(__name__)
Key = tuple[str, str, bytes]
"""Agent id, model, source."""


@dataclass(frozen=True)
class Answer:
    """`facts`: None where the call failed. `unable`: the agent's build cannot be asked. `at`: monotonic seconds."""

    facts: agent_pb2.ModelFacts | None
    unable: bool
    at: float


def newest(pools: Mapping[str, Mapping[str, object]]) -> dict[str, tuple[Pool, ModelSpec]]:
    """Specs as they stand, by pool; those that are wrong in themselves are left out."""
    found = {}
    for key, obj in pools.items():
        try:
            pool, model = pool_from_resource(obj)
        except InvalidSpec:
            continue
        if model.source.hugging_face is None:
            found[key] = pool, model
    return found


def may_use(pool: Pool, agent: Agent) -> bool:
    return agent.connected and set(pool.node_selector) <= set(agent.labels.items())


class Inspector:
    """Holds no more than one answer per agent, model and source of a spec that exists."""

    def __init__(self) -> None:
        self.answers: dict[Key, Answer] = {}
        self._asked: dict[Key, asyncio.Task[None]] = {}

    def look(self, specs: Iterable[tuple[Pool, ModelSpec]], agents: Mapping[str, Agent]) -> None:
        """Gives agents what they have said, forgets what no spec is about any more, and asks where something is to be learned."""
        wanted: dict[Key, tuple[Agent, Pool, types_pb2.Model]] = {}
        spoken_of: set[tuple[str, bytes]] = set()
        for pool, spec in specs:
            model = spec.to_proto()
            source = model.source.SerializeToString(deterministic=True)
            spoken_of.add((model.name, source))
            for agent in agents.values():
                if may_use(pool, agent):
                    wanted[agent.agent_id, model.name, source] = agent, pool, model
        self.answers = {k: a for k, a in self.answers.items() if k[0] in agents and k[1:] in spoken_of}
        for key in [k for k in self._asked if k not in wanted]:
            self._asked.pop(key).cancel()
        self._asked = {k: t for k, t in self._asked.items() if not t.done()}
        for (agent_id, name, where), answer in self.answers.items():
            if answer.facts is not None:
                agents[agent_id].inspected[name, where] = answer.facts
        for key, (agent, pool, model) in wanted.items():
            if len(self._asked) < AT_ONCE and key not in self._asked and agent.report.host_connected and self._due(key, agent, model):
                self._asked[key] = asyncio.create_task(self._ask(key, agent, pool, model))

    def _due(self, key: Key, agent: Agent, model: types_pb2.Model) -> bool:
        known = agent.facts_of(model.name, model.source)
        if known is not None and not known.problem:
            return False
        return key not in self.answers or time.monotonic() - self.answers[key].at > RETRY_S

    async def _ask(self, key: Key, agent: Agent, pool: Pool, model: types_pb2.Model) -> None:
        directive = agent_pb2.PoolDirective(pool=types_pb2.PoolRef(name=pool.name, uid=pool.uid), model=model)
        request = agent_pb2.InspectRequest(contract_version=CONTRACT_VERSION, pools=[directive])
        facts, unable = None, False
        try:
            answer = await agent.link.stub.Inspect(request, timeout=CALL_S)
            facts = next((f for f in answer.models if f.model == model.name), None)
        except grpc.aio.AioRpcError as e:
            unable = e.code() is grpc.StatusCode.UNIMPLEMENTED
            log.log(logging.DEBUG if unable else logging.WARNING, "%s did not read %s: %s", agent.agent_id, model.name, e.details())
        self.answers[key] = Answer(facts, unable, time.monotonic())

    def pending(self, pool: Pool, spec: ModelSpec, agents: Mapping[str, Agent]) -> bool:
        """Whether somebody can tell what the model is and has not done so. One who does not answer is waited for once, not for ever."""
        model = spec.to_proto()
        source = model.source.SerializeToString(deterministic=True)
        unheard = learned = False
        able = 0
        for agent in agents.values():
            if not may_use(pool, agent):
                continue
            answer = self.answers.get((agent.agent_id, model.name, source))
            known = agent.facts_of(model.name, model.source) is not None
            able += answer is None or not answer.unable
            learned |= known
            unheard |= answer is None and not known and agent.report.host_connected
        return able > 0 and (unheard or not learned)

    async def close(self) -> None:
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
