"""Where to measure, and how much of an engine that may take."""

from dataclasses import dataclass

KV_SHARE = 0.8
STEPS, STEPS_MAX = 24, 96


@dataclass(frozen=True)
class Points:
    """Where to measure. Trimmed to what the engine takes."""

    chunks: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    cached: tuple[int, ...] = (0, 512, 2048, 8192, 32768)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    contexts: tuple[int, ...] = (64, 512, 2048, 8192, 32768)
    repeats: int = 5


QUICK = Points((16, 64, 256, 1024), (0, 512), (1, 4, 16), (64, 512), 3)
