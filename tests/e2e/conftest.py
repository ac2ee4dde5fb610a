"""The whole system with the tiny model: control plane, chart, operator, gateway, two agents with their engine hosts. Once per session."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from nitsum_local.binaries import BinariesMissing, ensure
from nitsum_local.demo.watch import PoolWatch, create_pool
from nitsum_local.stage import NodeSpec, Stage, pool_manifest, wait_until
from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.stock import stock_starting

from .kinds import Seen, reference

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 160
PLANNER = {"dwellSeconds": 20, "cooldownSeconds": 2}


class System:
    """A stage that serves the pool `tiny` on all four slots of its two nodes."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.model = stage, "tiny-llama"
        self.watch = PoolWatch(stage.api, "default", "tiny")
        self.died: dict[int, float] = {}
        """Engines that tests killed: pid, and when (monotonic seconds)."""

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.stage.base_url, verify=self.stage.ssl_context(), timeout=300)

    def logs(self) -> str:
        """The end of every process's log, and what the pool says of itself."""
        tails = [f"--- {f.stem}\n{f.read_text(errors='replace')[-2500:]}" for f in sorted(self.stage.supervisor.logs.glob("*.log"))]
        return "\n".join([*tails, f"--- status\n{self.watch.status}"])

    async def until(self, probe: str, timeout_s: float = 120) -> None:
        """`settled`, `ready`, ...: a property of the pool's watch. Raises AssertionError with the logs."""

        async def holds() -> bool:
            await self.watch.refresh()
            return bool(getattr(self.watch, probe))

        try:
            await wait_until(holds, f"the pool is {probe}", timeout_s)
        except TimeoutError as e:
            raise AssertionError(f"{e}\n{self.logs()}") from e

    async def serves(self, timeout_s: float = 120) -> None:
        async def answers() -> bool:
            async with self.client() as client:
                body = {"model": self.model, "prompt": "hello", "max_tokens": 2, "temperature": 0}
                return (await client.post("/v1/completions", json=body)).status_code == 200

        try:
            await wait_until(answers, "the gateway serves", timeout_s)
        except (TimeoutError, httpx.HTTPError) as e:
            raise AssertionError(f"{e!r}\n{self.logs()}") from e


@dataclass(frozen=True)
class Expected:
    """What a stock engine answers to every kind of request; `stop` is the stop string that one of them uses.

    `profile`: what `nitsum profile --from-engine` wrote of it.
    """

    seen: dict[str, Seen]
    stop: str
    profile: str


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable[[float], str], contextlib.ExitStack]]:
    """A stock engine that starts while others do; whoever has asked it everything closes it."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(stock_starting(tiny_llama(), tmp_path_factory.mktemp("stock"))), stack


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def expected(stock: tuple[Callable[[float], str], contextlib.ExitStack], tmp_path_factory: pytest.TempPathFactory) -> Expected:
    ready, stack = stock
    with stack:
        url = await asyncio.to_thread(ready, 300)
        async with httpx.AsyncClient(base_url=url) as client:
            seen, stop = await reference(client, "default", MAX_TOKENS)
        out = tmp_path_factory.mktemp("profile") / "stock.json"
        asked = ["--from-engine", url, "--quick", "--model", "tiny-llama", "--gpu", "slot", "--out", str(out)]
        command = await asyncio.create_subprocess_exec(sys.executable, "-m", "nitsum_cli.main", "profile", *asked)
        assert await command.wait() == 0
    assert not [s.error for s in seen.values() if s.error]
    return Expected(seen, stop, out.read_text())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def system(stock: object, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """`stock`: both take half a minute to start, each on one core."""
    try:
        binaries = await asyncio.to_thread(ensure)
    except BinariesMissing as e:
        pytest.fail(str(e), pytrace=False)
    nodes = (NodeSpec("node-0", 2), NodeSpec("node-1", 2))
    async with Stage(tmp_path_factory.mktemp("stage"), binaries, nodes) as stage:
        await stage.start_control_plane()
        await stage.install({"config": {"planner": PLANNER, "profile": {"onlineCorrection": False}}})
        await stage.start_operator()
        await stage.start_gateway()
        await stage.start_nodes()
        manifest = pool_manifest(ROOT / "examples/tiny.yaml", tiny_llama())
        manifest["spec"]["budget"]["gpus"] = 4
        await create_pool(stage.api, "default", manifest)
        running = System(stage)
        await running.until("ready", 240)
        await running.serves()
        yield running
