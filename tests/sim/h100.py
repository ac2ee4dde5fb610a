"""Llama-3.1-8B on H100 as a profile, from the step times that the design states (modelled); contexts and KV by the model's own sizes."""

from nitsum.perf.profile import Profile, TpTable

BATCH = (1.0, 8.0, 32.0, 128.0, 512.0)
CONTEXT = (128.0, 2048.0, 8192.0, 32768.0)
TPOT_MS = {1: (6.6, 7.4, 9.5, 18.3), 2: (4.1, 4.4, 5.6, 10.3), 4: (2.6, 2.8, 3.5, 6.3), 8: (2.0, 2.2, 2.7, 4.3)}
TTFT_2K_MS = {1: 46.0, 2: 27.0, 4: 20.0, 8: 16.0}
KV_TOKENS = {1: 360_000, 2: 900_000, 4: 1_900_000, 8: 3_800_000}
KV_MS_PER_TOKEN = 131072 / 2e12 * 1e3
"""131,072 bytes of KV per token at 2 TB/s."""


def _table(tp: int) -> TpTable:
    at_2k = (*TPOT_MS[tp], TPOT_MS[tp][-1] * 3.4)
    decode = tuple(
        tuple(max(ms + b * (c - 2048) * KV_MS_PER_TOKEN / tp, ms * 0.4) for c in CONTEXT) for b, ms in zip(BATCH, at_2k, strict=True)
    )
    fixed, per_token = TPOT_MS[tp][0], (TTFT_2K_MS[tp] - TPOT_MS[tp][0] * 0.6) / 2048
    prefill = (fixed, max(fixed, fixed * 0.6 + per_token * 256), TTFT_2K_MS[tp], TTFT_2K_MS[tp] * 4.15, TTFT_2K_MS[tp] * 20)
    return TpTable(BATCH, CONTEXT, decode, (1.0, 256.0, 2048.0, 8192.0, 32768.0), prefill, KV_TOKENS[tp])


PROFILE = Profile("llama-8b.h100", "llama-8b", "h100_sxm", "modelled", "for tests", {tp: _table(tp) for tp in TPOT_MS}, 150.0, 2e6)
