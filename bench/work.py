"""What every part of the benchmark sends: so many streams, so long prompts, and when they move."""

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 96
MOVE_AFTER = 32


def prompts(streams: int, run: int) -> list[list[int]]:
    """Of one run; no two runs share a first page, so that no cache helps."""
    return [[3 + (31 * run + 7 * i + j * (i + 1)) % 900 for j in range(PROMPT_TOKENS)] for i in range(streams)]
