"""A real host process with real engines: streams of a bare gateway cross TP1 x 2 -> TP2 -> TP1 x 2, token for token."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.host.v1 import host_pb2, host_pb2_grpc
from nitsum_api.issue import issue, new_ca
from nitsum_api.node.v1 import node_pb2, node_pb2_grpc
from nitsum_api.security import Identity, secure_channel
from nitsum_api.types.v1 import types_pb2
from nitsum_sglang.remains import running
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.ports import free_ports

from .conftest import submit

POOL = types_pb2.PoolRef(name="default/chat", uid="u")
GPUS = ["n0-slot-0", "n0-slot-1"]


def directive(
    operation_id: str, generation: int, tp_size: int, *, tps: tuple[int, ...] = (1, 2), budget: int = 0, roles: tuple[int, ...] = (0, 0)
) -> agent_pb2.NodeDirective:
    def blocks(tp: int) -> list[list[str]]:
        return [GPUS[i : i + tp] for i in range(0, 3 - tp, tp)]

    engines = [
        types_pb2.ResidentEngine(engine_id=f"e{tp}-{i}", model="tiny", tp_size=tp, gpu_uuids=b)
        for tp in tps
        for i, b in enumerate(blocks(tp))
    ]
    groups = [
        types_pb2.Group(
            group_id=f"g{tp_size}-{i}",
            engine_id=f"e{tp_size}-{i}",
            pool=POOL,
            model="tiny",
            tp_size=tp_size,
            gpu_uuids=b,
            role=roles[i],
            capacity=types_pb2.Capacity(prefill_tokens_per_step=budget),
        )
        for i, b in enumerate(blocks(tp_size))
    ]
    model = types_pb2.Model(name="tiny", source=types_pb2.ModelSource(path=str(tiny_llama())))
    pools = [agent_pb2.PoolDirective(pool=POOL, model=model)]
    return agent_pb2.NodeDirective(
        operation_id=operation_id,
        generation=generation,
        term=1,
        pools=pools,
        residency=engines,
        layout=groups,
        mode=types_pb2.FLIP_MODE_ABORT,
    )


class Running:
    """The process, and a client for each of its two doors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = Path("/dev/shm") / f"nitsum-th-{os.getpid()}"
        ca = new_ca()
        for role in ("host", "gateway", "operator"):
            (folder / role).mkdir()
            for name, data in issue(ca, Identity(role, "t")).items():
                (folder / role / name).write_bytes(data)
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        argv = [
            "--listen",
            self.address,
            "--tls-dir",
            str(folder / "host"),
            "--socket",
            str(folder / "h.sock"),
            "--slots",
            "2",
            "--node-name",
            "n0",
        ]
        argv += ["--state-dir", str(folder / "s"), "--memory-dir", str(self.memory)]
        log = (folder / "host.log").open("wb")
        self.process = subprocess.Popen([sys.executable, "-m", "nitsum_host.main", *argv], stdout=log, stderr=log)
        self.channel = grpc.aio.insecure_channel(f"unix:{folder / 'h.sock'}")
        self.stub = host_pb2_grpc.HostServiceStub(self.channel)

    def log(self) -> str:
        return (self.folder / "host.log").read_text()[-4000:]

    async def apply(self, d: agent_pb2.NodeDirective) -> agent_pb2.ApplyResponse:
        request = host_pb2.ApplyRequest(contract_version=CONTRACT_VERSION, directive=d)
        return (await self.stub.Apply(request, timeout=90, wait_for_ready=True)).answer

    async def applied(self, operation_id: str, timeout_s: float = 120) -> agent_pb2.NodeReport:
        report = agent_pb2.NodeReport()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for answer in self.stub.Watch(host_pb2.WatchRequest(interval_ms=100)):
                    report = answer.report
                    if report.applied_operation_id == operation_id:
                        return report
                    assert not report.problem, report.problem + self.log()
        raise AssertionError(f"{operation_id} was not applied: {report}{self.log()}")

    def children(self) -> list[tuple[int, str]]:
        """Its processes below, with their command lines."""
        parents, lines = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        found, todo = [], [self.process.pid]
        while todo:
            ours = [p for p, parent in parents.items() if parent == todo[0]]
            todo = todo[1:] + ours
            found += [(p, lines[p]) for p in ours if p in lines]
        return found

    async def stop(self) -> None:
        await self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            shutil.rmtree(self.memory, ignore_errors=True)


OUTPUT_TOKENS = 400
"""Seconds: the stream of an engine that is ahead must still run when the others have begun and two flips are over."""


@dataclass
class Gateway:
    """Follows successors with exact resume, as a gateway does."""

    call: "grpc.aio.StreamStreamCall[node_pb2.AttachRequest, node_pb2.AttachResponse]"
    prompts: dict[str, list[int]] = field(default_factory=dict)
    got: dict[str, list[int]] = field(default_factory=dict)
    finish: dict[str, int] = field(default_factory=dict)
    hop: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    cached: dict[str, list[int]] = field(default_factory=dict)
    """Prompt tokens that were not computed, by hop."""

    async def send(self, name: str, group_id: str, epoch: int) -> None:
        self.hop[name] = self.hop.get(name, 0) + 1
        out = self.got.setdefault(name, [])
        s = submit([*self.prompts[name], *out], OUTPUT_TOKENS, ignore_eos=True)
        s.request_id, s.group_id, s.epoch, s.resume_k = f"{name}:{self.hop[name]}", group_id, epoch, len(out)
        await self.call.write(node_pb2.AttachRequest(submit=s))

    async def read(self) -> None:
        while (frame := await self.call.read()) is not grpc.aio.EOF:
            if frame.WhichOneof("frame") == "refused":
                name = frame.refused.request_id.split(":")[0]
                if frame.refused.reason == node_pb2.Refused.REASON_MOVED and frame.refused.successors:
                    await self.send(name, frame.refused.successors[0].group_id, frame.refused.successors[0].epoch)
                else:
                    self.problems.append(str(frame.refused))
                    self.finish[name] = 0
            for delta in frame.tokens.deltas:
                name = delta.request_id.split(":")[0]
                self.got[name] += delta.token_ids
                self.times.setdefault(name, []).append(time.monotonic())
                if delta.token_ids:
                    self.cached.setdefault(name, []).extend([delta.cached_tokens] * (self.hop[name] - len(self.cached.get(name, []))))
                if delta.HasField("finish"):
                    if delta.finish.kind == node_pb2.Finish.KIND_MOVED:
                        next_ = delta.finish.successors[hash(name) % len(delta.finish.successors)]
                        await self.send(name, next_.group_id, next_.epoch)
                    else:
                        self.finish[name] = delta.finish.kind


@pytest.fixture
async def host() -> AsyncIterator[Running]:
    with tempfile.TemporaryDirectory(prefix="nt") as folder:
        r = Running(Path(folder))
        try:
            yield r
        finally:
            await r.stop()


async def streams(
    r: Running, names: list[str], layout: agent_pb2.NodeReport, during: Callable[[], Awaitable[None]] | None = None
) -> Gateway:
    async with secure_channel(r.address, "host", r.folder / "gateway") as channel:
        g = Gateway(node_pb2_grpc.NodeServiceStub(channel).Attach())
        await g.call.write(node_pb2.AttachRequest(hello=node_pb2.Hello(contract_version=CONTRACT_VERSION, gateway_id="t", pool=POOL)))
        reader = asyncio.create_task(g.read())
        for i, name in enumerate(names):
            g.prompts[name] = [10 + int(name), *range(20, 60)]
            where = layout.groups[i % len(layout.groups)].group
            await g.send(name, where.group_id, where.epoch)
        async with asyncio.timeout(120):
            if during is not None:
                while min((len(v) for v in g.got.values()), default=0) < 10:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await during()
            while len(g.finish) < len(names):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        reader.cancel()
        assert not g.problems
        return g


def awake_intervals(folder: Path) -> list[tuple[str, float, str, str]]:
    rows = []
    for file in folder.glob("s/e/*/awake.jsonl"):
        rows += [(gpu, e["t"], e["event"], e["engine"]) for e in map(json.loads, file.read_text().splitlines()) for gpu in e["gpus"]]
    return sorted(rows, key=lambda r: (r[0], r[1]))


def never_two_awake(folder: Path) -> None:
    """By the engines' own logs, killed ones included: the host closes what they left open."""
    awake: dict[str, str] = {}
    rows = awake_intervals(folder)
    assert rows
    for gpu, _, event, engine in rows:
        assert awake.get(gpu, engine) == engine, f"{engine} woke on {gpu} while {awake[gpu]} was awake"
        awake.pop(gpu, None) if event == "park" else awake.__setitem__(gpu, engine)


@pytest.mark.timeout(400)
async def test_streams_cross_flips_token_for_token(host: Running) -> None:
    assert (await host.apply(directive("op1", 1, 1))).WhichOneof("answer") == "accepted", host.log()
    report = await host.applied("op1")
    names = [str(i) for i in range(6)]
    unmoved = await streams(host, names, report)

    async def there_and_back() -> None:
        for i, tp in ((2, 2), (3, 1)):
            assert (await host.apply(directive(f"op{i}", i, tp, budget=32))).WhichOneof("answer") == "accepted"
            flip = (await host.applied(f"op{i}", 30)).flip
            assert flip.outcome == agent_pb2.FlipReport.OUTCOME_DONE
            if i == 2:
                assert flip.streams_moved == len(names)

    log = host.folder / "s/e/e2-0/engine.log"
    warm = log.stat().st_size
    moved = await streams(host, names, report, there_and_back)
    assert moved.got == unmoved.got
    beside = re.findall(r"Prefill batch.*#new-token: (\d+),.*#running-req: [1-9]", log.read_bytes()[warm:].decode())
    assert max(map(int, beside), default=0) <= 32, "B's groups bound what prefills beside streams"
    assert all(n >= 2 for n in moved.hop.values()), moved.hop
    never_two_awake(host.folder)
    assert (await host.apply(directive("op3", 3, 1))).WhichOneof("answer") == "already_done"
    wrong = await host.apply(directive("op9", 9, 2, tps=(1,)))
    assert wrong.rejected.reason == agent_pb2.ApplyResponse.Rejected.REASON_NOT_RESIDENT


@pytest.mark.timeout(400)
async def test_streams_are_handed_over_from_prefill_to_decode_token_for_token(host: Running) -> None:
    """Abort and resume over the node's KV store: what one engine prefilled, the other loads."""
    prefill_decode = types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE
    assert (await host.apply(directive("op1", 1, 1, tps=(1,), roles=prefill_decode))).WhichOneof("answer") == "accepted", host.log()
    report = await host.applied("op1")
    entry = agent_pb2.NodeReport(groups=[g for g in report.groups if g.group.role == types_pb2.ROLE_PREFILL])
    names = [str(i) for i in range(6)]
    handed = await streams(host, names, entry)
    assert set(handed.hop.values()) == {2}, "one hand-over each"
    assert all(cached == [0, 32] for cached in handed.cached.values()), handed.cached
    assert (await host.apply(directive("op2", 2, 1, tps=(1,)))).WhichOneof("answer") == "accepted"
    unmoved = await streams(host, names, await host.applied("op2"))
    assert set(unmoved.hop.values()) == {1}, "both are Mixed now"
    assert handed.got == unmoved.got
    never_two_awake(host.folder)


@pytest.mark.timeout(300)
async def test_a_parked_engine_that_is_killed_comes_back_and_wakes(host: Running) -> None:
    assert (await host.apply(directive("op1", 1, 1))).WhichOneof("answer") == "accepted", host.log()
    await host.applied("op1")
    pids = json.loads((host.folder / "s/e/e2-0/remains.json").read_text())["pids"]
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(120):
        async for answer in host.stub.Watch(host_pb2.WatchRequest(interval_ms=100)):
            engine = next(e for e in answer.report.engines if e.engine.engine_id == "e2-0")
            if engine.restarts == 1 and engine.state == agent_pb2.EngineReport.STATE_PARKED:
                break
    assert (await host.apply(directive("op2", 2, 2))).WhichOneof("answer") == "accepted"
    assert (await host.applied("op2")).flip.outcome == agent_pb2.FlipReport.OUTCOME_DONE
    # What engines stand on: without its store none could load, and all of them die with the zygote.
    for module in ("nitsum_sglang.weights.store", "nitsum_sglang.zygote"):
        (pid,) = [p for p in host.children() if module in p[1]]
        os.kill(pid[0], signal.SIGKILL)
    async with asyncio.timeout(180):
        async for answer in host.stub.Watch(host_pb2.WatchRequest(interval_ms=100)):
            report = answer.report
            up = [e.state in (agent_pb2.EngineReport.STATE_PARKED, agent_pb2.EngineReport.STATE_AWAKE) for e in report.engines]
            if all(up) and all(e.restarts for e in report.engines) and report.groups[0].state == types_pb2.GROUP_STATE_OPEN:
                break
    assert "started again" in host.log()
    await streams(host, ["0", "1"], report)
    assert (await host.apply(directive("op3", 3, 1))).WhichOneof("answer") == "accepted"
    assert (await host.applied("op3")).flip.outcome == agent_pb2.FlipReport.OUTCOME_DONE
    everything = host.children()
    await host.stop()
    assert not [p for p in everything if running(p[0])]
    never_two_awake(host.folder)
    assert not host.memory.exists()
