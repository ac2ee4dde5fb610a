"""The gap of a flip TP1 -> TP2 and back, beside a stock restart and a zygote start, in one run on one machine.

usage: uv run python bench/flip.py [--quick] [--no-restart] [--json FILE]

Twice: as a client sees it (OpenAI streams through gateway, agent and host: `client_side.py`) and as the engine host sees it
(`host_side.py`), where B's own prefill of the same work is measured too: the floor of both.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import client_side
import host_side
import httpx
from rich.console import Console
from rich.table import Table
from work import PROMPT_TOKENS, prompts

from nitsum_sglang.testing.models import tiny_llama
from nitsum_sglang.testing.stock import stock_server

STOCK_START_S = 600.0
"""On a machine that does much else."""


def stock_restart_s(model: Path, folder: Path) -> float:
    """Kill to first token, bytecode compiled: what a TP change costs without resident engines."""
    with stock_server(model, folder, timeout_s=STOCK_START_S):
        pass
    start = time.perf_counter()
    with stock_server(model, folder, tp_size=2, timeout_s=STOCK_START_S) as url:
        body = {"input_ids": prompts(1, 0)[0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        httpx.post(url + "/generate", json=body, timeout=120).raise_for_status()
        return time.perf_counter() - start


async def measure(quick: bool, restart: bool) -> dict[str, Any]:
    rounds = 3 if quick else 10
    model = tiny_llama()
    out: dict[str, Any] = {
        "origin": "measured",
        "model": "tiny random Llama, fp32, CPU",
        "prompt_tokens": PROMPT_TOKENS,
        "machine": {"cpus": os.cpu_count(), "python": sys.version.split()[0], "platform": platform.machine()},
    }
    with tempfile.TemporaryDirectory(prefix="nitsum-b") as tmp:
        folders = {name: Path(tmp, name) for name in ("stock", "c", "h")}  # short: sockets lie in them
        for folder in folders.values():
            folder.mkdir(mode=0o700)
        out["client"] = await client_side.measure(model, folders["c"], rounds)
        moved = {streams: out["client"][f"flip_{streams}"]["moved_after_tokens_p50"] for streams in (1, 8)}
        out["host"] = await host_side.measure(model, folders["h"], rounds, moved)
        restarts = (1 if quick else 3) if restart else 0
        out["stock_restart_s"] = [round(stock_restart_s(model, folders["stock"]), 2) for _ in range(restarts)]
    for streams in (1, 8):
        floor = out["host"][f"flip_{streams}"]["own_prefill_ms_p50"]
        for side in ("client", "host"):
            row = out[side][f"flip_{streams}"]
            row["over_own_prefill_ms"] = round(row["gap_ms_p50"] - floor, 1)
            row["ratio_to_own_prefill"] = round(row["gap_ms_p50"] / floor, 2)
            if restart:
                row["stock_restart_over_gap"] = round(statistics.median(out["stock_restart_s"]) * 1e3 / row["gap_ms_p50"])
    return out


def show(out: dict[str, Any]) -> None:
    """As in docs/benchmarks.md."""
    table = Table(title=f"{out['model']}, prompt {out['prompt_tokens']} tokens (measured)")
    sides = [("client", 1), ("client", 8), ("host", 1), ("host", 8)]
    for column in ("", *(f"{side}, {n} stream{'s' * (n > 1)}" for side, n in sides)):
        table.add_column(column)
    keys = dict.fromkeys(key for side, n in sides for key in out[side][f"flip_{n}"])
    for key in keys:
        table.add_row(key, *(str(out[side][f"flip_{n}"].get(key, "")) for side, n in sides))
    console, host, weights = Console(), out["host"], out["client"]["weights"]
    console.print(table)
    if out["stock_restart_s"]:
        console.print(f"stock restart at TP2, bytecode compiled, kill to first token: {out['stock_restart_s']} s")
    console.print(
        f"zygote, once a node: {host['zygote_itself_s']} s; engine: TP1 {host['zygote_start_tp1_s']}, TP2 {host['zygote_start_tp2_s']} s"
    )
    private = ", ".join(f"{name} {e['private']}" for name, e in weights["engines"].items())
    console.print(f"weights of all resident layouts: {weights['all_over_one_copy']} x one copy ({weights['one_copy_bytes']} bytes)")
    console.print(f"private weight bytes of each engine: {private}")
    processes = Table("process", "of", "PSS MB", "private MB", title="every process of the node and the gateway")
    for p in out["client"]["processes"]:
        processes.add_row(p["what"], p["of"], str(p["pss_mb"]), str(p["private_mb"]))
    processes.add_row("all", "", str(round(sum(p["pss_mb"] for p in out["client"]["processes"]), 1)), "")
    console.print(processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one stock restart")
    parser.add_argument("--no-restart", action="store_true", help="leave out the stock restarts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    out = asyncio.run(measure(args.quick, not args.no_restart))
    show(out)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
