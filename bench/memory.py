"""What the processes of a node hold: PSS, and the weights among it, from smaps."""

import re
import socket
from pathlib import Path
from typing import Any

import psutil

from nitsum_sglang.weights import wire


def processes(roots: dict[str, int]) -> list[dict[str, Any]]:
    """Every process under `roots` (name -> pid): whose it is, what it says it is, PSS and private MB."""
    found = []
    for owner, pid in roots.items():
        root = psutil.Process(pid)
        for p in [root, *root.children(recursive=True)]:
            try:
                rows = _rollup(p.pid)
                found.append({"of": owner, "what": _title(p), "pid": p.pid, **rows})
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    return found


def _title(p: psutil.Process) -> str:
    words = p.cmdline()
    if "-m" in words:
        return words[words.index("-m") + 1]
    if "multiprocessing.resource_tracker" in " ".join(words):
        return "multiprocessing.resource_tracker"
    return " ".join(words)[:48].strip()


def _rollup(pid: int) -> dict[str, float]:
    rows = dict(re.findall(r"(?m)^(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text()))
    private = int(rows["Private_Clean"]) + int(rows["Private_Dirty"])
    return {"pss_mb": round(int(rows["Pss"]) / 1024, 1), "private_mb": round(private / 1024, 1)}


def weights(pids: list[int], socket_path: Path, tp_size: int) -> dict[str, int]:
    """Bytes of one engine's weights. Private: pages of the store's file that a process copied (smaps `Anonymous`; a shared page that one
    process alone maps counts as `Private` there), and what the store says a rank must copy since its slices are no whole pages."""
    areas = [a for pid in pids for a in _areas(pid) if ".weights" in a.partition("\n")[0]]
    copied = sum(ask(socket_path, {"type": "private_bytes", "tp_size": tp_size, "tp_rank": r})["private_bytes"] for r in range(tp_size))
    return {"mapped": _sum(areas, "Rss"), "pss": _sum(areas, "Pss"), "private": _sum(areas, "Anonymous") + copied}


def _areas(pid: int) -> list[str]:
    return re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text())


def _sum(areas: list[str], row: str) -> int:
    return sum(int(v) for a in areas for v in re.findall(rf"(?m)^{row}:\s+(\d+)", a)) << 10


def ask(socket_path: Path, request: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(str(socket_path))
        wire.send(s, request)
        reply: dict[str, Any] = wire.loads(_reply(s))
        return reply


def _reply(s: socket.socket) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        part = s.recv(1 << 16)
        if not part:
            raise ConnectionError("the weight store closed the connection")
        data += part
    return data[4:]
