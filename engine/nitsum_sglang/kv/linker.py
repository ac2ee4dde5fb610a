"""SGLang's seam for an external KV cache, bound to the node's page store: `SharedKvLinker`, named by the engine's flags.

SGLang asks `lookup` for pages that the device lacks, `load`s them into slots, and `offload`s pages that it has computed. All of it runs on
the scheduler's thread, so copies are few and large, and nothing raises: what fails is a miss, or a load that SGLang aborts and the host
moves. Between `lookup` and `load` a page cannot be evicted in practice: `lookup` marks it used.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.runtime_context import get_parallel

from .store import PageStore, Run

CHUNK_PAGES = 64
"""Pages copied between device and memory at once; bounds the buffer."""
DEFAULT_MAX_BYTES = 1 << 30

log = logging.getLogger(__name__)


def own_run(total_heads: int, local_heads: int, tp_size: int, rank: int) -> tuple[Run, bool]:
    """The absolute KV heads of a rank, and whether it is the one of its replicas that writes."""
    replicas = max(1, tp_size * local_heads // total_heads)
    return Run(rank // replicas * local_heads, local_heads), rank % replicas == 0


class _NoLayers:
    """Loads are whole before the forward starts: no layer to wait for."""

    def set_consumer(self, index: int) -> None:
        pass

    def wait_until(self, layer: int) -> None:
        pass


class SharedKvLinker(UnifiedCacheLinker):  # type: ignore[misc]
    """`extra_config`: directory, namespace (the model's revision), total_kv_heads, max_bytes."""

    def __init__(self, server_args: Any, params: Any, *, components: Any, extra_config: dict[str, Any], forward_stream: Any = None) -> None:
        self.forward_stream = forward_stream
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self.page: int = params.page_size
        self.buffers: list[torch.Tensor] = [*pool.k_buffer, *pool.v_buffer]
        first = self.buffers[0]
        if any(b.shape[1:] != first.shape[1:] or b.dtype != first.dtype for b in self.buffers):
            raise ValueError("SharedKvLinker: K and V of all layers must have one shape and dtype; start the engine without kv_dir")
        parallel, total = get_parallel(), int(extra_config["total_kv_heads"])
        self.own, self.writes = own_run(total, first.shape[1], parallel.tp_size, parallel.tp_rank)
        self.head_shape = (len(self.buffers), self.page, first.shape[2])
        head_bytes = len(self.buffers) * self.page * first.shape[2] * first.element_size()
        identity = (extra_config["namespace"], self.page, str(first.dtype), total, self.head_shape)
        namespace = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        limit = int(extra_config.get("max_bytes") or DEFAULT_MAX_BYTES)
        self.store = PageStore(extra_config["directory"], namespace, total, head_bytes, limit)
        self.layer_done_counter = _NoLayers()
        self.pools = {PoolName.KV: pool}
        self.queued: dict[str, tuple[list[str], torch.Tensor]] = {}
        self.completed: deque[bool] = deque()
        self.landed: dict[int, bool] = {}
        self.started = -1
        log.info("KV pages in %s: heads %d to %d of %d", self.store.folder, self.own.first, self.own.first + self.own.count - 1, total)

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Prefix lengths in pages that are there for this rank; SGLang intersects the ranks'."""
        found = 0
        for key in transfers[0].keys:
            if not self.store.has(key, self.own, touch=True):
                break
            found += 1
        return list(range(1, found + 1))

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Every rank must answer alike, so it never depends on this rank's files."""
        self.queued[rid] = (list(transfers[0].keys), transfers[0].device_indices.clone())
        return True

    def start_layer_wise_loading(self) -> int:
        if not self.queued:
            return -1
        self.started += 1
        try:
            landed = all([self._load(keys, indices) for keys, indices in self.queued.values()])
        except Exception:
            log.exception("KV pages could not be loaded")
            landed = False
        self.queued.clear()
        self.landed[self.started] = landed
        return self.started

    def _load(self, keys: list[str], indices: torch.Tensor) -> bool:
        for part, slots in self._chunks(keys, indices):
            staged = torch.empty((len(part), self.own.count, *self.head_shape), dtype=self.buffers[0].dtype)
            view = memoryview(staged.view(torch.uint8).numpy()).cast("B")
            size = self.own.count * self.store.head_bytes
            for i, key in enumerate(part):
                if not self.store.read(key, self.own, view[i * size : (i + 1) * size]):
                    log.warning("a KV page went between lookup and load")
                    return False
            # [pages, heads, buffers, page, dim] -> [buffers, tokens, heads, dim]
            rows = staged.permute(2, 0, 3, 1, 4).flatten(1, 2).to(self.buffers[0].device)
            for buffer, values in zip(self.buffers, rows, strict=True):
                buffer[slots] = values
        return True

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self.landed.pop(counter_index, True)

    def cancel_queued_load(self, rid: str) -> bool:
        return self.queued.pop(rid, None) is not None

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        try:
            if self.writes:
                self._offload(transfers[0])
            self.completed.append(True)
        except Exception:
            log.exception("KV pages could not be stored")
            self.completed.append(False)
        return True

    def _offload(self, transfer: Any) -> None:
        if self.forward_stream is not None and self.buffers[0].is_cuda:
            self.forward_stream.synchronize()
        for keys, slots in self._chunks(list(transfer.keys), transfer.device_indices):
            new = [i for i, key in enumerate(keys) if not self.store.has(key, self.own)]
            if not new:
                continue
            picked = slots.view(len(keys), self.page)[new].flatten()
            rows = torch.stack([b[picked] for b in self.buffers])
            # [buffers, pages, page, heads, dim] -> [pages, heads, buffers, page, dim]
            rows = rows.view(len(self.buffers), len(new), self.page, *rows.shape[2:]).permute(1, 3, 0, 2, 4).contiguous().cpu()
            data = memoryview(rows.view(torch.uint8).numpy()).cast("B")
            size = self.own.count * self.store.head_bytes
            self.store.write({keys[i]: data[n * size : (n + 1) * size] for n, i in enumerate(new)}, self.own)

    def _chunks(self, keys: list[str], indices: torch.Tensor) -> Iterator[tuple[list[str], torch.Tensor]]:
        for start in range(0, len(keys), CHUNK_PAGES):
            part = keys[start : start + CHUNK_PAGES]
            yield part, indices[start * self.page : (start + len(part)) * self.page]

    def num_completed_offloads(self) -> int:
        return len(self.completed)

    def pop_completed_offload(self) -> bool:
        return self.completed.popleft()

    def reset(self) -> None:
        self.queued.clear()
        self.completed.clear()
        self.landed.clear()

    def close(self) -> None:
        self.reset()
