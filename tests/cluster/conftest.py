"""One real control plane per pytest session. Without binaries the tests fail, with the remedy; nothing is skipped."""

import asyncio
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from nitsum_local import existing
from nitsum_local.binaries import BinariesMissing, ensure, needed
from nitsum_local.binaries import kubectl as kubectl_path
from nitsum_local.controlplane import ControlPlane, api_client
from nitsum_local.install import install_chart

Submit = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="session")
def binaries() -> dict[str, Path]:
    try:
        return ensure(needed())
    except BinariesMissing as e:
        pytest.fail(str(e), pytrace=False)


@pytest.fixture(scope="session")
def submit() -> Iterator[Submit]:
    """Runs a coroutine on a loop that lasts as long as the session, as the processes that it starts must."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(180)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="session")
def control_plane(binaries: dict[str, Path], submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path_factory.mktemp("controlplane"), binaries)
    submit(plane.start())
    yield plane
    submit(plane.stop())


@pytest.fixture(scope="session")
def admin_kubeconfig(control_plane: ControlPlane) -> Path:
    return control_plane.admin_kubeconfig


@pytest.fixture(scope="session")
def admin(admin_kubeconfig: Path) -> Iterator[Any]:
    with api_client(admin_kubeconfig) as api:
        yield api


@pytest.fixture(scope="session")
def installed(control_plane: ControlPlane, binaries: dict[str, Path], submit: Submit) -> Iterator[ControlPlane]:
    """The chart, workloads off. In a cluster that exists: only where nothing of nitsum is, and gone in the end."""
    if control_plane.existing:
        submit(existing.claim(control_plane.admin_kubeconfig))
    submit(install_chart(control_plane.admin_kubeconfig, binaries["helm"], control_plane.state_dir))
    yield control_plane
    if control_plane.existing:
        submit(existing.leave(control_plane.admin_kubeconfig, binaries["helm"]))


@pytest.fixture(scope="session")
def kubectl(admin_kubeconfig: Path) -> Callable[..., str]:
    def call(*args: str) -> str:
        command = [str(kubectl_path()), "--kubeconfig", str(admin_kubeconfig), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"kubectl {' '.join(args)}: {done.stderr}"
        return done.stdout

    return call
