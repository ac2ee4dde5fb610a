"""What is found again of prompts when the router knows prefixes: Mooncake's conversation trace (`hash_ids`), in its own time, through the
routers' own code. Groups are modelled: a cache of so many tokens each, least recently used goes, and a constant pace.

`python bench/prefixes.py --traces DIR [--seconds 900] [--json FILE]`. No engine and no SLO in it.
"""

import argparse
import heapq
import json
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitsum.affinity import Affinity
from nitsum.routing import GroupView, Key, Routes, decide
from nitsum_cli import files

TRACE = "mooncake_fast25_conversation.jsonl.gz"
TRACE_BLOCK = 512
"""Tokens of one of its `hash_ids`."""
TICK_S = 3.0
KEYS = [(node, f"g{i}") for node in "ab" for i in range(4)]
PREFILL_TOKENS_S, TOKEN_S, START_S = 30_000, 0.015, 0.2
VIEW_S = 1.0


@dataclass
class Cache:
    tokens: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    running: int = 0

    def take(self, blocks: list[int]) -> int:
        """Blocks that were found; now all are there."""
        found = next((i for i, b in enumerate(blocks) if b not in self.blocks), len(blocks))
        for b in reversed(blocks):
            self.blocks[b] = None
            self.blocks.move_to_end(b)
        while len(self.blocks) * TRACE_BLOCK > self.tokens:
            self.blocks.popitem(last=False)
        return found


def prompt(row: dict[str, Any]) -> "array[int]":
    """Tokens that are the same where `hash_ids` are."""
    ids = array("q")
    for h in row["hash_ids"]:
        ids.extend(range(h * TRACE_BLOCK, (h + 1) * TRACE_BLOCK))
    return ids[: row["input_length"]]


def run(rows: list[dict[str, Any]], fronts: int, capacity: int, cache_tokens: int, knows: bool) -> dict[str, float]:
    """Parts of the prompts that groups had, and that one cache as large as theirs would have had; part of requests sent to a full group."""
    caches, whole = {key: Cache(cache_tokens) for key in KEYS}, Cache(cache_tokens * len(KEYS))
    routes = [Routes(GroupView(key, 1, True, frozenset(), capacity=capacity) for key in KEYS) for _ in range(fronts)]
    known = [Affinity(b"key") for _ in range(fronts)]
    ends: list[tuple[float, Key]] = []
    found = would = total = full = 0
    looked = 0.0
    for n, row in enumerate(rows):
        now = row["at"]
        while ends and ends[0][0] <= now:
            caches[heapq.heappop(ends)[1]].running -= 1
        if now - looked >= VIEW_S:
            looked = now
            for key, cache in caches.items():
                for r in routes:
                    r.put(GroupView(key, 1, True, frozenset(), cache.running, capacity=capacity))
        r, k, ids = routes[n % fronts], known[n % fronts], prompt(row)
        digests = k.digests(ids, "") if knows else ()
        choice = decide("t", False, r, warm=k.warm(digests, len(ids)))
        assert choice is not None
        key = choice.groups[0].key
        r.submitted(key)
        k.ran(digests, key, 1)
        cache, blocks = caches[key], row["hash_ids"][: len(ids) // TRACE_BLOCK]
        full += cache.running >= capacity
        cache.running += 1
        hit = cache.take(blocks)
        found, would, total = found + hit, would + whole.take(blocks), total + len(blocks)
        prefill_s = (len(ids) - hit * TRACE_BLOCK) / PREFILL_TOKENS_S
        heapq.heappush(ends, (now + START_S + prefill_s + row["output_length"] * TOKEN_S, key))
    return {"found": round(found / total, 3), "of_one_cache": round(would / total, 3), "to_full": round(full / len(rows), 3)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--traces", type=Path, required=True, metavar="DIR")
    options.add_argument("--seconds", type=float, default=900.0)
    options.add_argument("--json", type=Path, metavar="FILE")
    args = options.parse_args()
    rows = [json.loads(line) for line in files.lines(args.traces / TRACE)]
    rows = [row | {"at": row["timestamp"] / 1e3 + n * 0.37 % TICK_S} for n, row in enumerate(rows)]  # spread over its tick
    rows = sorted((row for row in rows if row["at"] < args.seconds), key=lambda row: row["at"])
    out: dict[str, Any] = {}
    for cache_tokens in (300_000, 2_000_000):
        for fronts in (1, 2):
            for capacity in (12, 4):
                name = f"{cache_tokens} tokens a group, {fronts} fronts, {capacity} run"
                out[name] = {way: run(rows, fronts, capacity, cache_tokens, way == "prefixes") for way in ("least loaded", "prefixes")}
                print(f"{name}: {out[name]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
