"""A profile measured on a live, idle SGLang server through /generate: one new token after prompts of several lengths, alone and behind a
cached prefix; then steps of several batches decoding together. Medians, so that a pause or a neighbour spoils a point only if it lasts.

What is timed is what a client at the engine's own door waits; what of it is no step (HTTP, tokenizer, the way back) is found by how much
less a prompt holds up a stream that decodes, and kept apart. Points that do not fit into the
engine's KV are computed from those that do (attention grows with batch x context, chunk x cached) and counted in the note.
"""

import asyncio
import os

import httpx

from nitsum.errors import InvalidSpec
from nitsum.perf.tables import MixedStep, Profile
from nitsum_cli.measure.engine import Engine, Facts
from nitsum_cli.measure.points import QUICK, STEPS_MAX, Points
from nitsum_cli.measure.tp_table import Say, table

__all__ = ["QUICK", "Engine", "Facts", "Points", "measured", "profile"]


async def measured(url: str, model: str, gpu: str, api_key: str, points: Points, say: Say) -> Profile:
    engine = Engine(url, api_key)
    try:
        facts = await engine.facts()
        say(f"{facts.model} at TP {facts.tp_size} on {facts.device}, SGLang {facts.version}, KV for {facts.kv_tokens} tokens")
        made, computed = await table(engine, facts, points, say)
    except httpx.HTTPError as e:
        raise InvalidSpec("--from-engine", f"{url} failed while it was measured: {type(e).__name__}: {e}") from e
    finally:
        await engine.close()
    name, kind = model or facts.model.rstrip("/").rsplit("/", 1)[-1], gpu or facts.device
    note = (
        f"Measured on a live SGLang {facts.version} at TP {facts.tp_size} through /generate: medians, HTTP apart; "
        f"{computed} of the points computed where KV or prefix cache did not allow them. KV tokens as the engine says. "
        "The fixed part of a flip is modelled."
    )
    mixed = MixedStep.OVERLAP if facts.mixed else MixedStep.SEPARATE
    source = {"tool": "sglang", "version": facts.version}
    return Profile(
        f"{name.rsplit('/', 1)[-1].lower()}.{kind}",
        name,
        kind,
        "measured",
        note,
        {facts.tp_size: made},
        flip_fixed_ms=150.0,
        context_length=facts.prompt_max + STEPS_MAX,
        source=source,
        mixed=mixed,
    )


def profile(url: str, model: str, gpu: str, api_key_env: str, quick: bool, say: Say) -> Profile:
    """Empty `model` and `gpu`: as the server says. Raises InvalidSpec."""
    return asyncio.run(measured(url, model, gpu, os.environ.get(api_key_env, ""), QUICK if quick else Points(), say))
