"""Which pools are acted on, and as what: the newest valid spec, else the last accepted one, which status keeps across restarts."""

from collections.abc import Mapping
from dataclasses import dataclass
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
            raise InvalidSpec("spec.model", f.problem, Reason.UNSUPPORTED_MODEL)
        if f.legal_tp and (wrong := [t for t in pool.allowed_tp if t not in f.legal_tp]):
            text = f"TP {wrong[0]} does not divide {pool.model}; legal are {', '.join(map(str, f.legal_tp))}"
            raise InvalidSpec("spec.tensorParallel.allowed", text, Reason.ILLEGAL_TENSOR_PARALLEL)


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
) -> dict[str, Judgement]:
    """Older pools first: they keep a model's name. `rejected`: agents' ILLEGAL_TP messages by (pool, generation)."""
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
            check_facts(pool, facts.get(pool.model, []))
            if key_message := rejected.get((key, generation)):
                raise InvalidSpec("spec.tensorParallel.allowed", key_message, Reason.ILLEGAL_TENSOR_PARALLEL)
            if not pool.profile and not gpu_types and last is not None and last.generation == generation:
                result[key] = Judgement(last, "True", Reason.ACCEPTED, "The spec is in force.")
            elif not pool.profile and not gpu_types:  # a profile goes by GPU type, which no agent has named yet
                result[key] = Judgement(last, "Unknown", Reason.MODEL_FACTS_PENDING, "No agent has reported its GPUs yet; is one running?")
            else:
                accepted = Accepted(pool, model, profile_for(pool, gpu_types, profiles), generation)
                result[key] = Judgement(accepted, "True", Reason.ACCEPTED, "The spec is in force.")
        except InvalidSpec as e:
            after = f" Generation {last.generation} stays in force." if last else ""
            if last is not None and last.pool.model in owner:
                last = None
            result[key] = Judgement(last, "False", e.reason, f"{e}.{after}")
        in_force = result[key].accepted
        if in_force is not None:
            owner[in_force.pool.model] = key
    return result
