"""A host without gRPC and SGLang: the real service, engines, flips and node over fake engines, and a gateway that follows its streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from nitsum.flip import Deadlines
from nitsum.layout import Role
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.host.v1 import host_pb2
from nitsum_api.node.v1 import node_pb2
from nitsum_api.types.v1 import types_pb2
from nitsum_host import streams
from nitsum_host.engines import Engines, Settings
from nitsum_host.journal import Journal
from nitsum_host.node import Node, Slot
from nitsum_host.service import Host
from nitsum_host.testing.fake_engine import FakeEngine, next_token
from nitsum_sglang.port import Engine, EngineSpec, Limits

Finish, Refused, Outcome = node_pb2.Finish, node_pb2.Refused, agent_pb2.FlipReport
GPUS = ("g0", "g1")
POOL = types_pb2.PoolRef(name="default/p")


def whole(prompt: Sequence[int], count: int) -> list[int]:
    """What a stream that never moved gets."""
    out = list(prompt)
    for _ in range(count):
        out.append(next_token(out))
    return out[len(prompt) :]


class AnyModel(Host):
    """No checkpoint is read."""

    def _inspect(self, pool: agent_pb2.PoolDirective) -> agent_pb2.ModelFacts:
        return agent_pb2.ModelFacts(model=pool.model.name, revision="r", legal_tp=[1, 2])


class Gateway:
    """Sends each stream on as the router does, and keeps what it got."""

    number = 1

    def __init__(self, node: Node) -> None:
        self.node = node
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.got: dict[str, list[int]] = {}
        self.hops: dict[str, int] = {}
        self.crashes: dict[str, int] = {}
        self.refusals: list[node_pb2.Refused] = []
        self.done: set[str] = set()
        node.sessions.add(self)

    def start(self, name: str, count: int) -> None:
        self.prompts[name], self.got[name], self.hops[name] = ([1, 2, len(self.prompts)], count), [], 0
        self._anywhere(name)

    def send(self, frame: node_pb2.AttachResponse) -> None:
        for delta in frame.tokens.deltas:
            name, hop = delta.request_id.split("/")
            if int(hop) != self.hops[name] or name in self.done:
                continue
            self.got[name] += delta.token_ids
            kind = delta.finish.kind
            if kind in (Finish.KIND_STOP, Finish.KIND_LENGTH):
                self.done.add(name)
            elif kind:
                self.crashes[name] = self.crashes.get(name, 0) + (kind == Finish.KIND_ENGINE_CRASHED)
                self._follow(name, list(delta.finish.successors))
        if frame.HasField("refused"):
            self.refusals.append(frame.refused)
            self._follow(frame.refused.request_id.split("/")[0], list(frame.refused.successors))

    def _follow(self, name: str, successors: list[node_pb2.Successor]) -> None:
        loop = asyncio.get_running_loop()
        if successors:
            loop.call_soon(self._submit, name, successors[0].group_id, successors[0].epoch)
        else:
            loop.call_later(0.005, self._anywhere, name)

    def _anywhere(self, name: str) -> None:
        group = next((g for g in self.node.groups.values() if g.state == types_pb2.GROUP_STATE_OPEN), None)
        if group is None or self.node.draining:
            asyncio.get_running_loop().call_later(0.005, self._anywhere, name)
        else:
            self._submit(name, group.group.group_id, group.wire.epoch)

    def _submit(self, name: str, group_id: str, epoch: int) -> None:
        self.hops[name] += 1
        (prompt, count), got = self.prompts[name], self.got[name]
        submit = node_pb2.Submit(
            request_id=f"{name}/{self.hops[name]}", group_id=group_id, epoch=epoch, input_ids=[*prompt, *got], resume_k=len(got)
        )
        if self.hops[name] > 1:
            submit.follows = f"{name}/{self.hops[name] - 1}"
        submit.sampling.max_new_tokens, submit.suspect = count, self.crashes.get(name, 0) > 0
        streams.submit(self.node, self, submit)

    async def all_done(self) -> None:
        async with asyncio.timeout(20):
            while len(self.done) < len(self.prompts):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        for name, (prompt, count) in self.prompts.items():
            assert self.got[name] == whole(prompt, count), name


class World:
    """`arrange(engine_id, change)`: what the next engine of that id is like."""

    def __init__(self, folder: Path) -> None:
        self.made: dict[str, list[FakeEngine]] = {}
        self.arranged: dict[str, list[Callable[[FakeEngine], None]]] = {}
        self.holders: dict[str, str] = {}
        self.overlaps: list[str] = []
        self.steps_s = 0.0005
        self.node = Node(1)
        settings = Settings(folder, folder / "memory", weight_store=False, make=self._make, backoff_s=(0.01, 0.01, 0.01, 0.01, 0.01, 5.0))
        self.engines = Engines(self.node, settings, lambda engine_id: self.host.engine_ended(engine_id))
        self.journal = Journal(folder)
        gpus = [agent_pb2.Gpu(uuid=u) for u in GPUS]
        self.host: Host = AnyModel(self.node, self.engines, self.journal, folder, gpus, "")
        self.host.deadlines = Deadlines(end_s=0.2, park_s=0.15, wake_s=0.15)
        self.gateway = Gateway(self.node)
        self.operations = 0
        self.capacity = types_pb2.Capacity()

    def arrange(self, engine_id: str, *changes: Callable[[FakeEngine], None]) -> None:
        self.arranged.setdefault(engine_id, []).extend(changes)

    def _make(self, spec: EngineSpec) -> Engine:
        engine = FakeEngine(spec, self.steps_s)
        number = f"{spec.engine_id}#{len(self.made.setdefault(spec.engine_id, []))}"

        def on_awake(awake: bool) -> None:
            for gpu in spec.gpu_uuids:
                holder = self.holders.pop(gpu, None)
                if awake and holder is not None:
                    self.overlaps.append(f"{number} woke on {gpu} while {holder} was awake")
                if awake:
                    self.holders[gpu] = number

        engine.on_awake = on_awake
        if self.arranged.get(spec.engine_id):
            self.arranged[spec.engine_id].pop(0)(engine)
        self.made[spec.engine_id].append(engine)
        return engine

    def engine(self, engine_id: str) -> FakeEngine:
        return self.made[engine_id][-1]

    def slot(self, engine_id: str) -> Slot:
        return self.node.slots[engine_id]

    def directive(
        self, tp: int, tps: tuple[int, ...] = (1, 2), path: str = "/m", roles: Sequence[Any] = (), **fields: Any
    ) -> agent_pb2.NodeDirective:
        """`roles`: of the groups; Mixed where none is given."""
        self.operations += 1
        self.capacity.prefill_tokens_per_step = 100 * self.operations  # limits drift with each

        def blocks(n: int) -> list[tuple[str, ...]]:
            return [GPUS[i : i + n] for i in range(0, len(GPUS) - n + 1, n)]

        engines = [
            types_pb2.ResidentEngine(engine_id=f"e{n}-{i}", model="m", tp_size=n, gpu_uuids=b) for n in tps for i, b in enumerate(blocks(n))
        ]
        groups = [
            types_pb2.Group(
                group_id=f"g{tp}-{i}", engine_id=f"e{tp}-{i}", pool=POOL, model="m", tp_size=tp, gpu_uuids=b, capacity=self.capacity
            )
            for i, b in enumerate(blocks(tp) if tp else [])
        ]
        for group, role in zip(groups, roles, strict=False):
            group.role = role
        model = types_pb2.Model(name="m", source=types_pb2.ModelSource(path=path))
        return agent_pb2.NodeDirective(
            operation_id=f"op{self.operations}",
            generation=self.operations,
            pools=[agent_pb2.PoolDirective(pool=POOL, model=model)],
            residency=engines,
            layout=groups,
            **{"mode": types_pb2.FLIP_MODE_ABORT} | fields,
        )

    async def apply(self, d: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse:
        context: Any = None
        request = host_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=d)
        return (await self.host.Apply(request, context)).answer

    async def carried_out(self, d: agent_pb2.NodeDirective) -> agent_pb2.NodeReport:
        answer = await self.apply(d)
        assert answer.WhichOneof("answer") == "accepted", answer
        assert self.host.running is not None
        async with asyncio.timeout(10):
            await self.host.running
        return self.host.report()

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not what():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def check(self) -> None:
        """Holds between any two steps of the event loop."""
        node = self.node
        assert not self.overlaps, self.overlaps
        for group_id, live in node.groups.items():
            ours = {rid: s for rid, s in node.streams.items() if s.group_id == group_id}
            assert set(live.ledger.running) == {rid for rid, s in ours.items() if s.on_engine}, group_id
            queued = {rid for rid, s in ours.items() if not s.on_engine and rid not in live.waiting}
            assert live.ledger.queued_total == len(queued), group_id
            assert live.waiting.keys() <= ours.keys(), group_id
            slot = node.slots.get(live.group.engine_id)
            if live.state == types_pb2.GROUP_STATE_OPEN:
                assert slot is not None, group_id
                assert (slot.awake, slot.ended, slot.state) == (True, False, agent_pb2.EngineReport.STATE_AWAKE), group_id
                budget = live.group.capacity.prefill_tokens_per_step
                assert budget
                assert self.engine(live.group.engine_id).limits == Limits(budget), group_id
        self._check_places()
        assert all(s.group_id in node.groups for s in node.streams.values())
        assert sorted(node.by_request.values()) == sorted(node.streams)
        for gpu in GPUS:
            assert sum(s.awake and gpu in s.wire.gpu_uuids for s in node.slots.values()) <= 1, gpu

    def _check_places(self) -> None:
        """What prefills, and what is on its way, has one place each in a group that is open for it; what has begun, at most one."""
        node = self.node
        opened = [g for g in node.groups.values() if g.state == types_pb2.GROUP_STATE_OPEN and not node.draining]
        decode = [g.ledger for g in opened if g.group.role is Role.DECODE]
        prefill = [g for g in opened if g.group.role is Role.PREFILL] if decode else []
        fresh = [
            s for g in prefill for s in node.streams.values() if s.group_id == g.group.group_id and s.on_engine and not s.submit.resume_k
        ]
        places = [node.onward[POOL.name].place(s.rid) for s in fresh]
        assert all(s.begun if place is None else place in decode for s, place in zip(fresh, places, strict=True)), places
        on_way = sum(len(onward.on_way) for onward in node.onward.values())
        assert sum(d.reserved for d in decode) == sum(place is not None for place in places) + on_way
        assert not any(g.ledger.reserved or g.ledger.reserved_kv_tokens for g in node.groups.values() if g.ledger not in decode)
        assert all(g in prefill for g in node.groups.values() if g.ledger.onward is not None)

    async def _watch(self) -> None:
        while True:
            self.check()
            await asyncio.sleep(0)

    async def stop(self) -> None:
        await self.host.stop()
        await self.engines.stop()
        assert not self.holders, f"awake after the end: {self.holders}"


@contextlib.asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """Two groups at TP 1 serve; what must always hold is checked at every turn of the event loop, and at the end."""
    w = World(folder)
    watching = asyncio.create_task(w._watch())
    try:
        report = await w.carried_out(w.directive(1))
        assert not report.problem, report.problem
        yield w
        assert not watching.done() or watching.result() is None
        w.check()
    finally:
        watching.cancel()
        await w.stop()
