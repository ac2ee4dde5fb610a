"""HostService: the agent's orders. One directive at a time; it is carried out to its end even if the agent goes away."""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import logging
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from nitsum.flip import Deadlines
from nitsum.layout import FlipMode, Layout
from nitsum.residency import Residency
from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.host.v1 import host_pb2, host_pb2_grpc
from nitsum_api.types.v1 import types_pb2
from nitsum_host.engines import Engines
from nitsum_host.flips import FlipRun
from nitsum_host.groups import abort_streams, end_streams
from nitsum_host.journal import Journal
from nitsum_host.node import Node
from nitsum_host.places import link
from nitsum_host.read import Illegal, Reason, residency_and_layout
from nitsum_sglang.port import EngineEnded

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
Response = agent_pb2.ApplyResponse
MODELS_MAX = 64
"""Models whose facts are remembered besides those in use."""
TP_MAX = 64
MODES = {
    types_pb2.FLIP_MODE_LET_FINISH: FlipMode.LET_FINISH,
    types_pb2.FLIP_MODE_MIGRATE_FIRST: FlipMode.MIGRATE_FIRST,
}


class Host(host_pb2_grpc.HostServiceServicer):
    def __init__(
        self, node: Node, engines: Engines, journal: Journal, state_dir: Path, gpus: list[agent_pb2.Gpu], node_address: str
    ) -> None:
        self.node, self.engines, self.journal, self.state_dir = node, engines, journal, state_dir
        self.gpus, self.node_address = gpus, node_address
        self.incarnation = uuid.uuid4().hex
        self.applied = ""
        self.generation = 0
        self.running: asyncio.Task[None] | None = None
        self.running_id = ""
        self._turn = asyncio.Lock()  # one directive is judged at a time
        self.flip: FlipRun | None = None
        self.problem = ""
        self.deadlines = Deadlines()
        self.models: dict[str, agent_pb2.ModelFacts] = {}
        self._paths: dict[str, str] = {}
        """Where the facts in `models` were read."""

    async def Describe(self, request: host_pb2.DescribeRequest, context: Context) -> host_pb2.DescribeResponse:
        return host_pb2.DescribeResponse(
            contract_version=CONTRACT_VERSION,
            engine_build=f"sglang {importlib.metadata.version('sglang')}",
            node_address=self.node_address,
            gpus=self.gpus,
            applied_operation_id=self.applied,
            incarnation=self.incarnation,
        )

    def _inspect(self, pool: agent_pb2.PoolDirective) -> agent_pb2.ModelFacts:
        """What the checkpoint says; `problem` where it cannot be served."""
        facts = agent_pb2.ModelFacts(model=pool.model.name)
        if pool.model.source.WhichOneof("source") != "path":
            facts.problem = "only model sources with a path are served by this build"
            return facts
        try:
            from nitsum_sglang.checkpoint import read_facts, revision

            read = read_facts(pool.model.source.path, pool.model.name, self.engines.settings.dtype)
            facts.revision = revision(pool.model.source.path)
        except Exception as e:  # whatever is wrong with a user's checkpoint belongs into the report
            facts.problem = str(e)
            return facts
        legal = read.legal_tp(TP_MAX)  # whatever the number of GPUs here: a small node must not narrow what others may run
        if self.engines.settings.device == "cpu":  # SGLang's CPU backend does not replicate KV heads
            legal = tuple(t for t in legal if t <= read.num_kv_heads)
        facts.legal_tp.extend(legal)
        facts.weight_bytes, facts.kv_bytes_per_token, facts.context_length = read.weight_bytes, read.kv_bytes_per_token, read.context_length
        return facts

    async def Inspect(self, request: host_pb2.InspectRequest, context: Context) -> host_pb2.InspectResponse:
        return host_pb2.InspectResponse(models=[await self._read(p) for p in request.pools])

    async def _read(self, pool: agent_pb2.PoolDirective) -> agent_pb2.ModelFacts:
        """As it is now. A problem that is remembered from this very source is over where it can be read by now."""
        facts = await asyncio.to_thread(self._inspect, pool)
        facts.source.CopyFrom(pool.model.source)
        name = pool.model.name
        if name in self.models and self.models[name].problem and self._paths[name] == pool.model.source.path:
            self.models[name] = facts
        return facts

    async def Apply(self, request: host_pb2.ApplyRequest, context: Context) -> host_pb2.ApplyResponse:
        async with self._turn:
            return host_pb2.ApplyResponse(answer=await self._apply(request))

    async def _apply(self, request: host_pb2.ApplyRequest) -> Response:
        d = request.directive
        if request.contract_version != CONTRACT_VERSION:
            return _rejected(Reason.REASON_CONTRACT_VERSION, f"this host speaks contract {CONTRACT_VERSION}")
        if not d.operation_id:
            return _rejected(Reason.REASON_INVALID, "operation_id: empty")
        flipped = self.flip.report.operation_id if self.flip is not None else ""  # however that ended: no second flip
        if d.operation_id in (self.applied, self.running_id, flipped):
            return Response(already_done=Response.AlreadyDone())
        if self.running_id:
            return _rejected(Reason.REASON_FLIP_RUNNING, f"operation {self.running_id} is running")
        if self.node.draining:
            return _rejected(Reason.REASON_DRAINING, "the node drains; it takes directives again when its engine host was started anew")
        try:
            residency, layout = residency_and_layout(d, frozenset(g.uuid for g in self.gpus))
            await self._legal(d, residency, layout)
        except Illegal as e:
            return _rejected(e.reason, str(e))
        try:
            self.journal.write(operation_id=d.operation_id, accepted=True, epoch=self.node.epoch)
        except OSError as e:
            self.problem = f"the host's journal: {e}"
            raise
        self.running_id, self.problem = d.operation_id, ""
        self.running = asyncio.create_task(self._carry_out(d, residency, layout))
        return Response(accepted=Response.Accepted())

    async def _legal(self, d: agent_pb2.NodeDirective, residency: Residency, layout: Layout) -> None:
        for pool in d.pools:
            name, path = pool.model.name, pool.model.source.path
            if name not in self.models or self.models[name].problem or self._paths[name] != path:
                facts = await self._read(pool)
                self.models.pop(name, None)
                self.models[name], self._paths[name] = facts, path
            if self.models[name].problem:
                raise Illegal(Reason.REASON_INVALID, f"model {name}: {self.models[name].problem}")
        named = {p.model.name for p in d.pools} | {s.wire.model for s in self.node.slots.values()}
        for old in [m for m in self.models if m not in named][: max(len(self.models) - MODELS_MAX, 0)]:
            del self.models[old], self._paths[old]
        for e in residency.engines:
            legal = list(self.models[e.model].legal_tp)
            if e.tp_size not in legal:
                raise Illegal(Reason.REASON_ILLEGAL_TP, f"model {e.model} cannot be split in {e.tp_size}: legal TP degrees are {legal}")
        for i, g in enumerate(layout.groups):
            live = self.node.groups.get(g.group_id)
            if live is not None and live.group.engine_id != g.engine_id:
                text = f"layout[{i}].engine_id: group {g.group_id!r} is on engine {live.group.engine_id!r}; another engine needs another id"
                raise Illegal(Reason.REASON_INVALID, text)

    async def _carry_out(self, d: agent_pb2.NodeDirective, residency: Residency, layout: Layout) -> None:
        paths = {p.model.name: p.model.source.path for p in d.pools}
        try:
            for name, path in paths.items():
                self.engines.revisions[path] = self.models[name].revision
            # An id that stands for another model now: its groups close, it ends, and it starts anew like any other.
            if stale := self.engines.stale(d.residency, paths):
                await self._flip(d, Layout(tuple(g for g in self.node.layout.groups if g.engine_id not in stale)), {})
                for engine_id in () if self.problem else stale:
                    await self.engines.remove(engine_id)
                if self.problem:
                    return
            # Cold first, while what serves goes on; widest engines last, since they touch most GPUs.
            await self.engines.ensure_all(sorted(d.residency, key=lambda e: (e.tp_size, e.engine_id)), paths)
            wires = {g.group_id: g for g in d.layout}
            self._adjust(layout, wires)
            await self._flip(d, layout, wires)
            if self.problem:
                return  # what serves may be on engines that this directive does not name
            for engine_id in [i for i in self.node.slots if residency.engine(i) is None]:
                await self.engines.remove(engine_id)
            await self.engines.forget_unused()
            self.applied, self.generation = d.operation_id, d.generation
            log.info("operation %s is done: %d groups, %d engines", d.operation_id, len(self.node.groups), len(self.node.slots))
        except (EngineEnded, OSError, TimeoutError) as e:
            self.problem = f"{type(e).__name__}: {e}"[:2000]
            log.error("operation %s: %s", d.operation_id, self.problem)
        except Exception as e:
            # A bug. Ending the host would end every stream of the node, those of groups that the flip never touched included; so what
            # serves goes on, and the report says that the operation did not end as it should.
            self.problem = f"internal error in operation {d.operation_id}: {type(e).__name__}: {e}"[:2000]
            log.exception("operation %s", d.operation_id)
        finally:
            self.running_id = ""
            self.node.touch()

    def _adjust(self, layout: Layout, wires: dict[str, types_pb2.Group]) -> None:
        """What stays may still change its shares and capacity."""
        node = self.node
        for group in layout.groups:
            live = node.groups.get(group.group_id)
            if live is not None and live.group.engine_id == group.engine_id:
                epoch = live.wire.epoch
                live.group = group
                live.wire.CopyFrom(wires[group.group_id])
                live.wire.epoch = epoch
                slot = node.slots[group.engine_id]
                live.ledger.set_capacity(group.capacity, group.shares, slot.info.max_total_tokens if slot.info else 0)
                self.engines.awake.govern(slot)
        link(node)

    async def _flip(self, d: agent_pb2.NodeDirective, layout: Layout, wires: dict[str, types_pb2.Group]) -> None:
        deadlines = dataclasses.replace(self.deadlines, let_finish_s=d.let_finish_ms / 1e3)
        mode = MODES.get(d.mode, FlipMode.ABORT)
        flip = FlipRun(self.engines, self.journal, self.state_dir, d.operation_id, layout, wires, mode, deadlines)
        if flip.empty:
            return
        self.flip = flip
        outcome = await flip.run()
        phases = ", ".join(f"{p.phase} {p.duration_ms:.0f} ms" for p in flip.report.phases)
        log.info("flip %s: %s; %d streams moved; %s", d.operation_id, flip.report.state, flip.report.streams_moved, phases)
        if outcome != agent_pb2.FlipReport.OUTCOME_DONE:
            self.problem = f"flip {flip.report.state}: {flip.report.message}"

    def engine_ended(self, engine_id: str) -> None:
        if self.flip is not None and not self.flip.flip.ended:
            self.flip.engine_ended(engine_id)

    def report(self) -> agent_pb2.NodeReport:
        node = self.node
        return agent_pb2.NodeReport(
            applied_operation_id=self.applied,
            applied_generation=self.generation,
            epoch=node.epoch,
            groups=[node.report(live) for live in node.groups.values()],
            engines=[
                agent_pb2.EngineReport(engine=s.wire, state=s.state, restarts=s.restarts, message=s.message) for s in node.slots.values()
            ],
            models=self.models.values(),
            flip=self.flip.report if self.flip else None,
            in_progress_operation_id=self.running_id,
            problem=self.problem or self.engines.problem,
            draining=node.draining,
        )

    async def Watch(self, request: host_pb2.WatchRequest, context: Context) -> AsyncIterator[host_pb2.WatchResponse]:
        interval_s = min(max(request.interval_ms or 1000, 50), 60_000) / 1e3
        while True:
            changed = self.node.changed  # of before the report: what changes while it is on its way is not missed
            yield host_pb2.WatchResponse(incarnation=self.incarnation, report=self.report())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), interval_s)
            await asyncio.sleep(0.02)  # changes come in bursts

    async def stop(self) -> None:
        """An operation in work goes no further: what follows ends its engines."""
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)

    async def Drain(self, request: host_pb2.DrainRequest, context: Context) -> host_pb2.DrainResponse:
        """For a host that is about to go: there is no way back but starting it anew. A flip in work goes on to its end."""
        self.node.draining = True
        link(self.node)
        log.info("draining %d streams within %d ms", len(self.node.streams), request.grace_ms)
        self.node.touch()
        deadline = asyncio.get_running_loop().time() + request.grace_ms / 1e3
        while self.node.streams and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for group_id in list(self.node.groups):
            abort_streams(self.node, group_id)
            end_streams(self.node, group_id)
        return host_pb2.DrainResponse()


def _rejected(reason: "Reason.ValueType", message: str) -> Response:
    return Response(rejected=Response.Rejected(reason=reason, message=message))
