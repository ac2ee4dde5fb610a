"""Which pools are acted on, and as what: the newest valid spec, else the last accepted one, which status keeps across restarts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nitsum.errors import InvalidSpec
from nitsum.perf.profile import Profile, find, load_shipped, shipped
from nitsum.pool import Pool
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.conditions import Reason
from nitsum_api.resources import ModelSpec, pool_from_resource


@dataclass(frozen=True)
class Accepted:
    """A spec in force."""

    pool: Pool
    model: ModelSpec
    profile: Profile
    generation: int


@dataclass(frozen=True)
class Judgement:
    """`accepted`: what is in force, which may be an older spec. The rest is the Accepted condition."""

    accepted: Accepted | None
    status: str
    reason: str
    message: str


def profile_for(pool: Pool, gpu_types: tuple[str, ...], read: Mapping[str, Profile]) -> Profile:
    """Named by the spec, else the shipped one of (model, GPU type). Raises InvalidSpec."""
    there = ", ".join(sorted({*read, *shipped()}))
    if pool.profile in read:
        return read[pool.profile]
    if pool.profile in shipped():
        return load_shipped(pool.profile)
    if pool.profile:
        raise InvalidSpec("spec.profile", f"no profile {pool.profile!r}; there are: {there}", Reason.UNKNOWN_PROFILE)
    for gpu in gpu_types:
        if (found := next((p for p in read.values() if (p.model, p.gpu) == (pool.model, gpu)), None) or find(pool.model, gpu)) is not None:
            return found
    kinds = ", ".join(gpu_types) or "GPUs that no agent has named yet"
    text = f"there is no profile of {pool.model} on {kinds}; name one in spec.profile; there are: {there}"
    raise InvalidSpec("spec.profile", text, Reason.UNKNOWN_PROFILE)


def check_facts(pool: Pool, facts: list[agent_pb2.ModelFacts]) -> None:
    """Raises InvalidSpec where an agent read something in the model's config that the spec contradicts."""
    for f in facts:
        if f.problem:
            where = f"{f.source.path}: " if f.source.path and f.source.path not in f.problem else ""
            text = f"{where}{f.problem}; put a checkpoint that can be served there on every node of the pool, or name another one"
            raise InvalidSpec("spec.model.source", text, Reason.UNSUPPORTED_MODEL)
    # Of the agents' together: hosts of earlier builds name only degrees that their own GPUs suffice for.
    legal = sorted({t for f in facts for t in f.legal_tp})
    if legal and (wrong := [t for t in pool.allowed_tp if t not in legal]):
        text = f"TP {wrong[0]} does not divide {pool.model}; legal are {', '.join(map(str, legal))}"
        raise InvalidSpec("spec.tensorParallel.allowed", text, Reason.ILLEGAL_TENSOR_PARALLEL)


def _stays(last: Accepted) -> str:
    return f"Generation {last.generation} stays in force."


def _age(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    meta = obj["metadata"]
    return meta.get("creationTimestamp", ""), meta.get("namespace", ""), meta["name"]


def judge(
    pools: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, list[agent_pb2.ModelFacts]],
    gpu_types: tuple[str, ...],
    profiles: Mapping[str, Profile],
    rejected: Mapping[tuple[str, int], str],
    before: Mapping[str, Accepted],
    pending: Collection[str] = (),
) -> dict[str, Judgement]:
    """Older pools first: they keep a model's name. `rejected`: agents' ILLEGAL_TP messages by (pool, generation).

    `facts` by model; those of another source than the spec's do not count. `pending`: pools whose model is being read by agents.
    """
    owner: dict[str, str] = {}
    result: dict[str, Judgement] = {}
    for key, obj in sorted(pools.items(), key=lambda kv: _age(kv[1])):
        if obj["metadata"].get("deletionTimestamp"):
            continue
        generation = obj["metadata"].get("generation", 0)
        last = before.get(key)
        if last is not None and (last.pool.uid != obj["metadata"].get("uid", "") or (key, last.generation) in rejected):
            last = None  # another pool of the same name, or one that an agent refused
        try:
            pool, model = pool_from_resource(obj)
            if pool.model in owner:
                text = f"{owner[pool.model]} is older and serves {pool.model!r}; rename one of them"
                raise InvalidSpec("spec.model.name", text, Reason.MODEL_NAME_TAKEN)
            if model.source.hugging_face is not None:
                text = "this build does not download models; put the checkpoint on the nodes and set spec.model.source.path"
                raise InvalidSpec("spec.model.source.huggingFace", text, Reason.UNSUPPORTED_MODEL)
            source = model.source.to_proto()
            check_facts(pool, [f for f in facts.get(pool.model, []) if not f.HasField("source") or f.source == source])
            if key_message := rejected.get((key, generation)):
                raise InvalidSpec("spec.tensorParallel.allowed", key_message, Reason.ILLEGAL_TENSOR_PARALLEL)
            if key in pending and (last is None or last.generation != generation):
                text = f"Agents have yet to read the model at {source.path}."
                after = f" {_stays(last)}" if last else ""
                result[key] = Judgement(last, "Unknown", Reason.MODEL_FACTS_PENDING, f"{text}{after}")
            elif not pool.profile and not gpu_types and last is not None and last.generation == generation:
                result[key] = Judgement(last, "True", Reason.ACCEPTED, "The spec is in force.")
            elif not pool.profile and not gpu_types:  # a profile goes by GPU type, which no agent has named yet
                result[key] = Judgement(last, "Unknown", Reason.MODEL_FACTS_PENDING, "No agent has reported its GPUs yet; is one running?")
            else:
                accepted = Accepted(pool, model, profile_for(pool, gpu_types, profiles), generation)
                result[key] = Judgement(accepted, "True", Reason.ACCEPTED, "The spec is in force.")
        except InvalidSpec as e:
            # A spec that was in force before this was known of it: what runs is left alone, but it is not "the last good one".
            kept = "" if last is None else "What runs of it stays." if last.generation == generation else _stays(last)
            after = f" {kept}" if kept else ""
            if last is not None and last.pool.model in owner:
                last = None
            result[key] = Judgement(last, "False", e.reason, f"{e}.{after}")
        in_force = result[key].accepted
        if in_force is not None and in_force.pool.model in owner:
            result[key] = replace(result[key], accepted=None)  # held back, and what it was is an older pool's name by now
        elif in_force is not None:
            owner[in_force.pool.model] = key
    return result
