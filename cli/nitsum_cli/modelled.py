"""A profile from aiconfigurator-core: measured kernel tables, summed as one step under CUDA graphs. A lower bound, so *modelled*."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

from nitsum.errors import InvalidSpec
from nitsum.perf.flip import FlipRates
from nitsum.perf.memory import GpuMemory, RankMemory
from nitsum.perf.names import gpu_type
from nitsum.perf.tables import MixedStep, Profile, TpTable
from nitsum_cli.configs import ModelConfig, load
from nitsum_cli.smooth import monotone

BACKEND, BACKEND_VERSION = "sglang", "0.5.14"
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
CONTEXTS = (1, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536, 131072)
CHUNKS = (
    *(1, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048),
    *(2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 16384, 20480, 24576, 32768),
)
CACHED = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
STEP_TOKENS_MAX, BATCH_MAX = 8192, 256
"""What the activation memory is for: SGLang's chunk and batch on an 80 GB GPU."""
USABLE_KV_TOKENS = 8192
"""A TP that leaves less KV than this on its own counts as one that does not fit."""
PCIE_SHARE, NVLINK_SHARE = 0.78, 0.8
"""Of the link's rate, what large copies reach: 50 GB/s of PCIe 5.0's 64, 360 of NVLink 4's 450."""


def _package() -> Any:
    try:
        return import_module("aiconfigurator_core")
    except ImportError as e:
        raise InvalidSpec("--gpu", "the kernel tables are not installed; install nitsum[profile], or measure with --from-engine URL") from e


def gpus() -> tuple[str, ...]:
    """GPU types that the tables cover with SGLang."""
    systems = resources.files(_package()) / "systems"
    known = [f.name.removesuffix(".yaml") for f in systems.iterdir() if f.name.endswith(".yaml")]
    return tuple(sorted(g for g in known if (systems / "data" / g / "attention" / BACKEND / BACKEND_VERSION).is_dir()))


def model_config(name: str, file: Path | None) -> ModelConfig:
    return load(name, file, [resources.files(_package()) / "model_configs"])


class Tables:
    """aiconfigurator's answers for one model on one GPU type."""

    def __init__(self, config: ModelConfig, gpu: str) -> None:
        self._package, self.config = _package(), config
        if (known := gpu_type(gpu)) not in gpus():
            raise InvalidSpec("--gpu", f"no kernel tables of {gpu!r}; there are: {', '.join(gpus())}", "UnknownGpu")
        self.gpu = known
        logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
        self._folder = tempfile.TemporaryDirectory(prefix="nitsum-config")
        Path(self._folder.name, "config.json").write_text(json.dumps(config.raw))

    def engine(self, tp_size: int) -> Any:
        """An EngineHandle. Raises InvalidSpec."""
        handle = import_module("aiconfigurator_core.sdk.engine").EngineHandle
        with self._spoken(tp_size):
            return handle.compile(self._folder.name, self.gpu, BACKEND, backend_version=BACKEND_VERSION, tp_size=tp_size)

    def memory(self, tp_size: int) -> tuple[RankMemory, int]:
        """Of a rank, and the GPU's bytes."""
        estimator = import_module("aiconfigurator_core.sdk.memory").KVCacheEstimator
        with self._spoken(tp_size):
            b = estimator.from_request(
                self._folder.name,
                self.gpu,
                BACKEND,
                BACKEND_VERSION,
                max_num_tokens=STEP_TOKENS_MAX,
                max_batch_size=BATCH_MAX,
                tp_size=tp_size,
            ).breakdown
        rank = RankMemory(
            int(b["weights_bytes"]), int(b["kv_size_per_token_bytes"]), int(b["activations_bytes"] + b["comm_overhead_bytes"])
        )
        return rank, int(b["gpu_memory_capacity_bytes"])

    def node(self) -> dict[str, float]:
        import yaml

        spec = yaml.safe_load((resources.files(self._package) / "systems" / f"{self.gpu}.yaml").read_text())
        node: dict[str, float] = spec["node"]
        return node

    @contextlib.contextmanager
    def _spoken(self, tp_size: int) -> Iterator[None]:
        """Foreign errors become ours, once."""
        try:
            yield
        except Exception as e:
            raise InvalidSpec("--model", f"{self.config.name} at TP {tp_size} on {self.gpu}: aiconfigurator-core: {e}") from e


def _table(engine: Any, rank: RankMemory, context_length: int) -> tuple[TpTable, float]:
    contexts = (*(c for c in CONTEXTS if c < context_length), context_length)
    chunks = tuple(c for c in CHUNKS if c <= context_length)
    cached = (*(c for c in CACHED if c < context_length), context_length)
    decode, moved = monotone([[engine.predict_decode_latency(b, c, 2) for c in contexts] for b in BATCHES])
    prefill, moved_too = monotone([[engine.predict_prefill_latency(1, n + c, c) for c in cached] for n in chunks], first_column=len(cached))
    first = tuple(r[0] for r in prefill)
    axes = (tuple(map(float, x)) for x in (BATCHES, contexts, chunks, cached))
    batch, context, tokens, behind = axes
    return TpTable(batch, context, decode, tokens, first, 0, behind, prefill, rank), max(moved, moved_too)


def profile(
    name: str,
    gpu: str,
    tp_sizes: tuple[int, ...] = (),
    config: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Profile:
    """`tp_sizes` empty: each of 1, 2, 4, 8 that is legal and fits; what does not is said. Raises InvalidSpec."""
    model = model_config(name, config)
    tables = Tables(model, gpu)
    node = tables.node()
    most = int(node["num_gpus_per_node"])
    legal = model.facts.legal_tp(most)
    if wrong := [tp for tp in tp_sizes if tp not in legal]:
        raise InvalidSpec("--tp", f"TP {wrong[0]} does not divide {name}; legal are {', '.join(map(str, legal))}", "IllegalTensorParallel")
    by_tp: dict[int, TpTable] = {}
    gpu_bytes, moved = 0, 0.0
    for tp in tp_sizes or tuple(tp for tp in (1, 2, 4, 8) if tp in legal):
        rank, gpu_bytes = tables.memory(tp)
        alone = GpuMemory(gpu_bytes).kv_tokens({tp: rank}, tp, (tp,))
        if alone < USABLE_KV_TOKENS:
            what = (
                f"TP {tp} does not fit on {tables.gpu}: {rank.weight_bytes / 1e9:.1f} GB of weights a GPU leave KV for {alone} tokens of "
                f"{gpu_bytes / 1e9:.1f} GB"
            )
            if tp in tp_sizes:
                raise InvalidSpec("--tp", what, "DoesNotFit")
            say(f"left out: {what}")
            continue
        by_tp[tp], change = _table(tables.engine(tp), rank, model.facts.context_length)
        moved = max(moved, change)
        say(f"TP {tp}: {len(BATCHES)} batches, {len(CHUNKS)} chunks")
    if not by_tp:
        raise InvalidSpec("--gpu", f"{name} fits on {tables.gpu} at no TP of 1, 2, 4, 8 within one node", "DoesNotFit")
    version = metadata.version("aiconfigurator-core")
    flip = FlipRates(pcie_bytes_per_s=node["pcie_bw"] * PCIE_SHARE, nvlink_bytes_per_s=node["intra_node_bw"] * NVLINK_SHARE)
    note = (
        f"Measured kernel tables of aiconfigurator-core {version} ({BACKEND} {BACKEND_VERSION}), summed as one step under CUDA graphs: a "
        f"lower bound. bf16. Made monotone (largest change {moved:.1%}). Flip cost: modelled from copy and prefill rates."
    )
    source = {"tool": "aiconfigurator-core", "version": version, "backend": BACKEND, "backend_version": BACKEND_VERSION}
    return Profile(
        name=f"{name.rsplit('/', 1)[-1].lower()}.{tables.gpu}",
        model=name,
        gpu=tables.gpu,
        origin="modelled",
        note=note,
        tables=by_tp,
        flip_fixed_ms=flip.fixed_ms,
        aliases=model.aliases,
        context_length=model.facts.context_length,
        source=source,
        mixed=MixedStep.FUSED,
        memory=GpuMemory(gpu_bytes),
        flip=flip,
    )
