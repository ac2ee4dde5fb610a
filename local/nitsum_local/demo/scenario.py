"""The demo from its first phase to its last."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from rich.live import Live

from nitsum.pool import AdaptationMode
from nitsum_local.binaries import kubectl, needed, use_existing
from nitsum_local.demo import flips, tools
from nitsum_local.demo.phases import Phase
from nitsum_local.demo.program import PLANNER, Program
from nitsum_local.demo.summary import Summary, summarise
from nitsum_local.demo.traffic import Question, Stream, Traffic, run_stream
from nitsum_local.demo.view import View
from nitsum_local.demo.watch import PoolWatch, create_pool, set_mode
from nitsum_local.install import local_address
from nitsum_local.preflight import gather, missing
from nitsum_local.stage import Stage, pool_manifest, wait_until

READY_S = 300.0
SETTLE_S = 60.0
PROGRESS_S = 5.0
REFERENCES_AT_ONCE = 4


def _bypass_proxy() -> None:
    """The demo's own hops are on this machine: a proxy that the shell names has no part in them."""
    mine = ["localhost", "127.0.0.1", local_address()]
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), *mine])


class Scenario:
    def __init__(self, root: Path, state_dir: Path, program: Program, view: View) -> None:
        self.root, self.state_dir, self.program, self.view = root, state_dir, program, view
        self.client: AsyncOpenAI | None = None

    async def run(self, keep: bool) -> Summary:
        """Raises RuntimeError where the machine lacks something; TimeoutError where a part does not come up."""
        view, result = self.view, self.state_dir.parent / "demo.json"
        result.unlink(missing_ok=True)  # an earlier run's is not this run's
        view.enter(Phase.PREFLIGHT, "what this machine has")
        if found := missing(gather(self.root)):
            raise RuntimeError("\n".join(f"missing: {one}" for one in found))
        _bypass_proxy()
        view.enter(Phase.BINARIES, f"{', '.join(needed())}: built once, then cached")
        binaries = await tools.binaries(view.say)
        view.enter(Phase.MODELS, "checkpoints, unpacked once")
        names = dict.fromkeys((self.program.checkpoint, *(checkpoint for _, checkpoint in self.program.others)))
        models = {name: await tools.model(name, view.say) for name in names}
        view.enter(
            Phase.CONTROL_PLANE,
            f"the cluster of {os.environ.get('KUBECONFIG', '~/.kube/config')}" if use_existing() else "a real one, on loopback",
        )
        flags = ("--max-total-tokens", str(self.program.max_total_tokens))
        async with Stage(self.state_dir, binaries, self.program.nodes, flags) as stage:
            await stage.start_control_plane()
            summary = await self._on(stage, models, keep)
            summary.write(result)
            if keep:
                await set_mode(stage.api, stage.pools_namespace, self.program.example, AdaptationMode.ACTIVE)
                view.say(f"pool {self.program.example} adapts again (it was frozen for the references)")
                view.say("everything stays up until Ctrl-C")
                await self._until_interrupted()
        return summary

    @staticmethod
    async def _until_interrupted() -> None:
        """To be interrupted is how a demo that stays up ends: no failure, so the cancellation goes no further."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None:
                task.uncancel()

    async def _on(self, stage: Stage, models: Mapping[str, Path], keep: bool) -> Summary:
        view = self.view
        view.enter(Phase.CHART, "helm install, workloads off: CRDs, permissions, Services, configuration")
        await stage.install({"config": {"planner": PLANNER, "profile": {"onlineCorrection": False}}})
        view.enter(Phase.OPERATOR, "with the chart's ServiceAccount; it issues every certificate")
        await stage.start_operator()
        view.enter(Phase.GATEWAY, "one OpenAI endpoint for all pools")
        await stage.start_gateway()
        view.enter(Phase.NODES, f"{len(stage.nodes)} agents, each with its engine host")
        await stage.start_nodes()
        view.enter(Phase.POOLS, f"examples/{self.program.example}.yaml, with the checkpoint's folder on this machine")
        for example, _ in self.program.others:
            view.say(f"beside it examples/{example}.yaml, a second pool, which gets no traffic")
        watch = await self._serve(stage, models)
        view.say(f"planned with the shipped profile {self._profile(watch)}; online correction is off")
        http = httpx.AsyncClient(verify=stage.ssl_context(), timeout=120)
        async with http, AsyncOpenAI(base_url=f"{stage.base_url}/v1", api_key="none", http_client=http, max_retries=0) as self.client:
            summary = await self._play(stage, watch)
        view.enter(Phase.SUMMARY, "what happened")
        for line in summary.lines():
            view.console.print(f"  {line}", soft_wrap=True)
        view.console.print("look around:" if keep else "look around (`make demo KEEP=1` stays up for it):")
        for line in summary.kubectl:
            view.console.print(f"  {line}", soft_wrap=True, highlight=False)
        return summary

    async def _serve(self, stage: Stage, models: Mapping[str, Path]) -> PoolWatch:
        program, view = self.program, self.view
        for example, checkpoint in ((program.example, program.checkpoint), *program.others):
            await create_pool(stage.api, stage.pools_namespace, pool_manifest(self.root / f"examples/{example}.yaml", models[checkpoint]))
        view.watch = watch = PoolWatch(stage.api, stage.pools_namespace, program.example)

        told, began = "", time.monotonic()
        said = began

        async def ready() -> bool:
            nonlocal told, said
            await watch.refresh()
            if watch.ready:
                return True
            if (message := watch.condition("Ready").get("message", "")) not in ("", told):
                told = message
                view.say(f"not ready yet: {message}")
            if (now := time.monotonic()) - said >= PROGRESS_S:
                said = now
                done, there = await watch.engines()
                engines = f"{done} of {there} engines of {program.example} are ready" if there else "no engine is reported yet"
                view.progress(f"{engines}, {now - began:.0f} s so far (it takes a minute or two)")
            return False

        async with self._drawn():
            await wait_until(ready, f"pool {program.example} is Ready; its status: kubectl describe spool {program.example}", READY_S)

        async def serves() -> bool:
            async with httpx.AsyncClient(verify=stage.ssl_context(), timeout=30) as http:
                body = {"model": self._model, "prompt": "hello", "max_tokens": 2}
                return (await http.post(f"{stage.base_url}/v1/completions", json=body)).status_code == 200

        await wait_until(serves, f"the gateway serves {self._model}; its log: {stage.supervisor.logs / 'gateway.log'}", READY_S)
        return watch

    @property
    def _model(self) -> str:
        return {"chat": "smollm2-135m-instruct", "tiny": "tiny-llama"}[self.program.example]

    @staticmethod
    def _profile(watch: PoolWatch) -> str:
        plan = watch.status.get("plan") or {}
        return f"{plan.get('profile', '?')} ({plan.get('profileOrigin', '?')})"

    async def _play(self, stage: Stage, watch: PoolWatch) -> Summary:
        assert self.client is not None
        view, began = self.view, time.monotonic()
        traffic = Traffic(self.client, self._model)
        view.streams = traffic.streams
        layouts = [watch.status.get("layout", "")]
        view.enter(Phase.TRAFFIC, "two tiers, whose mix changes")
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(watch.run()), group.create_task(traffic.run()), group.create_task(self._draw())]
            base = watch.flips
            for act in self.program.acts:
                view.headline = act.headline
                view.say(act.headline)
                traffic.loads, start = act.loads, time.monotonic()
                while (spent := time.monotonic() - start) < act.most_s:
                    if spent >= act.least_s and watch.flips - base >= act.until_flips and watch.settled:
                        break
                    await asyncio.sleep(0.25)
                    if (layout := watch.status.get("layout") or layouts[-1]) != layouts[-1]:
                        layouts.append(layout)
                if act.until_flips:  # the streams that crossed the flip go on for a while, so that their gap has an end
                    await asyncio.sleep(act.least_s / 2)
            view.headline = "no new requests; the last streams end"
            await traffic.settle(SETTLE_S)
            view.enter(Phase.REFERENCE, "what the streams asked that a flip met, once more, without a flip")
            await set_mode(stage.api, stage.pools_namespace, self.program.example, AdaptationMode.FROZEN)
            lines = stage.awake_lines()
            happened = flips.of_pool(lines, f"{stage.pools_namespace}.{self.program.example}", began)
            record = {"awake": lines, "streams": [asdict(s) for s in traffic.streams], "flips": watch.status.get("lastFlips")}
            (self.state_dir / "streams.json").write_text(json.dumps(record))
            moved = flips.moved(traffic.streams, happened)
            met = flips.met(traffic.streams, happened)
            references = await self._again([traffic.streams[i] for i in met])
            for task in tasks:
                task.cancel()
        first = happened[0].end - view.began if happened else None
        facts = {"first_flip_after_s": first, "layouts": layouts, "profile": self._profile(watch), "kubectl": self._kubectl(stage)}
        return summarise(traffic.streams, moved, met, references, len(happened), **facts)

    async def _again(self, streams: Sequence[Stream]) -> dict[Question, Stream]:
        """Each question once: greedy answers to the same question are the same."""
        assert self.client is not None
        client, free = self.client, asyncio.Semaphore(REFERENCES_AT_ONCE)

        async def one(s: Stream) -> Stream:
            async with free:
                return await run_stream(client, self._model, Stream(s.tier, s.prompt, s.max_tokens))

        distinct = {s.question: s for s in streams}
        return dict(zip(distinct, await asyncio.gather(*(one(s) for s in distinct.values())), strict=True))

    @contextlib.asynccontextmanager
    async def _drawn(self) -> AsyncIterator[None]:
        drawing = asyncio.create_task(self._draw())
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.wait([drawing])

    async def _draw(self) -> None:
        view = self.view
        if not view.console.is_terminal:
            while True:
                view.note_changes()
                await asyncio.sleep(0.5)
        with Live(view.render(), console=view.console, auto_refresh=False, transient=True) as live:
            while True:
                view.note_changes()
                live.update(view.render(), refresh=True)
                await asyncio.sleep(0.25)

    def _kubectl(self, stage: Stage) -> list[str]:
        base = f"{kubectl()} --kubeconfig {stage.control_plane.admin_kubeconfig}"
        name = self.program.example
        ca = stage.tls / "gateway/ca.crt"
        return [
            f"{base} get servingpools -o wide",
            f"{base} get servingnodes",
            f"{base} describe servingpool {name}",
            f"{base} explain servingpool.spec.tiers",
            f"curl --cacert {ca} {stage.base_url}/v1/models",
            f"curl --cacert {ca} {stage.base_url}/v1/chat/completions -H 'content-type: application/json' "
            f"-H 'x-nitsum-tier: {self.program.tiers[0]}' "
            f"""-d '{{"model": "{self._model}", "temperature": 0, "messages": [{{"role": "user", "content": "Hello"}}]}}'""",
        ]
