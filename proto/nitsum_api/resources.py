"""ServingPool and ServingNode as typed values. The schema is crds/; a test checks that these types have the same fields.

Reading is defensive: what the API server's rules should have refused raises InvalidSpec here, never an assertion. Unknown fields are
left out, as a newer schema may have some; of a manifest that a user wrote, `check_manifest` refuses them.
"""

from collections.abc import Collection, Mapping
from hashlib import sha256
from itertools import pairwise
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from nitsum.errors import InvalidSpec
from nitsum.pool import AdaptationMode, Pool, Tier
from nitsum.quantity import duration_ms, share
from nitsum_api.types.v1 import types_pb2

GROUP = "nitsum.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
POOL_KIND, NODE_KIND = "ServingPool", "ServingNode"
POOLS, NODES = "servingpools", "servingnodes"

VOLUMES_ROOT = "/var/lib/nitsum/volumes"
"""Where agents mount the claims that pools name: `<root>/<claimName>/<path>`."""

DURATION_MAX_MS = 3_600_000.0
MANIFEST_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
METADATA_FIELDS = (
    *("name", "namespace", "labels", "annotations", "finalizers", "ownerReferences", "generateName"),
    *("uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "managedFields"),
    "selfLink",
)
"""Of Kubernetes' ObjectMeta."""


class Part(BaseModel):
    """Base of all: camelCase outside, unknown fields ignored, immutable."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def dump(self) -> dict[str, Any]:
        """As it stands in the API: camelCase, no field that is None."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


class HuggingFace(Part):
    repo: str
    revision: str | None = None


class Pvc(Part):
    claim_name: str
    path: str | None = None


class ModelSource(Part):
    """Exactly one field is set."""

    hugging_face: HuggingFace | None = None
    pvc: Pvc | None = None
    path: str | None = None

    def to_proto(self) -> types_pb2.ModelSource:
        if self.hugging_face is not None:
            reference = types_pb2.ModelSource.HuggingFace(repo=self.hugging_face.repo, revision=self.hugging_face.revision or "")
            return types_pb2.ModelSource(hugging_face=reference)
        if self.pvc is not None:
            return types_pb2.ModelSource(path="/".join(p for p in (VOLUMES_ROOT, self.pvc.claim_name, self.pvc.path) if p))
        return types_pb2.ModelSource(path=self.path or "")


class ModelSpec(Part):
    name: str
    source: ModelSource
    context_length: int | None = None

    def to_proto(self) -> types_pb2.Model:
        return types_pb2.Model(name=self.name, source=self.source.to_proto(), context_length=self.context_length or 0)


class Budget(Part):
    gpus: int
    node_selector: dict[str, str] | None = None


class TensorParallel(Part):
    allowed: list[int] | None = None


class TierSpec(Part):
    name: str
    ttft: str | None = None
    tpot: str | None = None
    target: str | None = None
    weight: int | None = None
    default: bool | None = None


class Adaptation(Part):
    mode: Literal["Active", "Advisory", "Frozen"] | None = None


class PoolSpec(Part):
    model: ModelSpec
    profile: str | None = None
    budget: Budget
    tensor_parallel: TensorParallel | None = None
    tiers: list[TierSpec]
    adaptation: Adaptation | None = None


class Condition(Part):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int | None = None


class GpuCounts(Part):
    budget: int | None = None
    used: int | None = None
    held: int | None = None
    summary: str | None = None


class GroupCounts(Part):
    wanted: int | None = None
    ready: int | None = None


class AgentCounts(Part):
    known: int | None = None
    connected: int | None = None


class TierStatus(Part):
    """Rates and shares are text as people read them: `3.2/s`, `98.2%`."""

    name: str
    rate: str | None = None
    attainment: str | None = None
    goodput: str | None = None
    feasible: bool | None = None
    slack: str | None = None
    binding: str | None = None
    ttft_p50_ms: float | None = Field(None, alias="ttftP50Ms")
    ttft_p99_ms: float | None = Field(None, alias="ttftP99Ms")
    tpot_p50_ms: float | None = Field(None, alias="tpotP50Ms")
    tpot_p99_ms: float | None = Field(None, alias="tpotP99Ms")


class PlanStatus(Part):
    id: str | None = None
    generation: int | None = None
    operation_id: str | None = None
    decided_at: str | None = None
    verdict: Literal["Keep", "Change", "Blocked"] | None = None
    layout: str | None = None
    serving: str | None = None
    held: str | None = None
    gpus: int | None = None
    expected_goodput: str | None = None
    profile: str | None = None
    profile_origin: str | None = None
    reasons: list[str] | None = None
    rejected: list[str] | None = None
    remedies: list[str] | None = None


class FlipStatus(Part):
    time: str
    operation_id: str | None = None
    agent_id: str | None = None
    from_: str = Field(alias="from")
    to: str
    reason: str | None = None
    outcome: Literal["Running", "Done", "Reverted", "Failed"]
    streams_moved: int | None = None
    pause_ms: float | None = None


class AcceptedSpec(Part):
    """`spec`: JSON."""

    generation: int | None = None
    spec: str | None = None


class PoolStatus(Part):
    observed_generation: int | None = None
    term: int | None = None
    reason: str | None = None
    layout: str | None = None
    attainment: str | None = None
    goodput: str | None = None
    tiers_summary: str | None = None
    flips: int | None = None
    gpus: GpuCounts | None = None
    groups: GroupCounts | None = None
    agents: AgentCounts | None = None
    tiers: list[TierStatus] | None = None
    plan: PlanStatus | None = None
    accepted: AcceptedSpec | None = None
    last_flips: list[FlipStatus] | None = None
    conditions: list[Condition] | None = None


class NodeSpec(Part):
    agent_id: str | None = None
    node_name: str | None = None
    node_group: str | None = None


class GpuStatus(Part):
    uuid: str
    index: int | None = None
    type: str | None = None
    memory_bytes: int | None = None
    island: int | None = None


class GroupStatus(Part):
    id: str
    pool: str | None = None
    tp: int | None = None
    role: Literal["Mixed", "Prefill", "Decode"] | None = None
    state: Literal["Starting", "Open", "Closing", "Opening", "Failed"] | None = None
    gpus: list[int] | None = None
    tiers: list[str] | None = None


class EngineStatus(Part):
    id: str
    model: str | None = None
    tp: int | None = None
    state: Literal["Starting", "Warming", "Parked", "Awake", "Failed"] | None = None
    restarts: int | None = None
    message: str | None = None


class NodeStatus(Part):
    address: str | None = None
    contract_version: str | None = None
    engine_build: str | None = None
    epoch: int | None = None
    highest_term: int | None = None
    applied_generation: int | None = None
    applied_operation_id: str | None = None
    problem: str | None = None
    draining: bool | None = None
    layout: str | None = None
    gpu_count: int | None = None
    gpus: list[GpuStatus] | None = None
    groups: list[GroupStatus] | None = None
    engines: list[EngineStatus] | None = None
    last_flip: FlipStatus | None = None
    conditions: list[Condition] | None = None


def _field_path(location: tuple[int | str, ...]) -> str:
    return "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def pool_spec(obj: Mapping[str, Any]) -> PoolSpec:
    """The spec of a ServingPool as the API server gave it. Raises InvalidSpec with the path of the first field that is wrong."""
    try:
        return PoolSpec.model_validate(obj.get("spec") or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidSpec(_field_path(first["loc"]), _remedy(first["loc"], first["input"]) or first["msg"]) from None


def _remedy(location: tuple[int | str, ...], value: Any) -> str | None:
    """For a number where a text with a unit is wanted."""
    unit = {"ttft": "ms", "tpot": "ms", "target": "%"}.get(str(location[-1]) if location else "")
    if unit is None or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return f"{value} has no unit; write {value:g}{unit}"


def check_manifest(obj: Mapping[str, Any]) -> None:
    """Refuses what the API server would drop or refuse: fields that a ServingPool has not. Raises InvalidSpec with path and legal names."""
    _only(obj, MANIFEST_FIELDS, "")
    if isinstance(meta := obj.get("metadata"), Mapping):
        _only(meta, METADATA_FIELDS, "metadata")
    _known(PoolSpec, obj.get("spec"), "spec")


def _only(found: Mapping[Any, Any], legal: Collection[str], path: str) -> None:
    if extra := [k for k in found if k not in legal]:
        raise InvalidSpec(f"{path}.{extra[0]}" if path else str(extra[0]), f"unknown field; known are {', '.join(legal)}")


def _known(kind: Any, value: Any, path: str) -> None:
    """`kind`: an annotation. Values of the wrong type are the parser's to refuse."""
    if isinstance(kind, type) and issubclass(kind, Part):
        if isinstance(value, Mapping):
            fields = {f.alias or name: f.annotation for name, f in kind.model_fields.items()}
            _only(value, fields, path)
            for name, inner in value.items():
                _known(fields[name], inner, f"{path}.{name}")
    elif get_origin(kind) is list:
        for i, inner in enumerate(value if isinstance(value, list) else ()):
            _known(get_args(kind)[0], inner, f"{path}[{i}]")
    elif get_origin(kind) is UnionType:
        for one in get_args(kind):
            _known(one, value, path)


def _target_ms(text: str | None, path: str) -> float | None:
    if text is None:
        return None
    value = duration_ms(text, path)
    if not 0 < value <= DURATION_MAX_MS:
        raise InvalidSpec(path, f"{text!r} is out of range; write a duration above 0 and up to 1h")
    return value


def _tier(index: int, spec: TierSpec) -> Tier:
    path = f"spec.tiers[{index}]"
    weight = 1 if spec.weight is None else spec.weight
    if weight < 1:
        raise InvalidSpec(f"{path}.weight", f"{weight} is not a weight; write a whole number from 1 to 1000")
    return Tier(
        name=spec.name,
        ttft_ms=_target_ms(spec.ttft, f"{path}.ttft"),
        tpot_ms=_target_ms(spec.tpot, f"{path}.tpot"),
        target=Tier.target if spec.target is None else share(spec.target, f"{path}.target"),
        weight=float(weight),
        default=bool(spec.default),
    )


def _check_source(source: ModelSource) -> None:
    if sum(x is not None for x in (source.hugging_face, source.pvc, source.path)) != 1:
        raise InvalidSpec("spec.model.source", "set exactly one of huggingFace, pvc, path and remove the others")


def _check_tiers(tiers: tuple[Tier, ...]) -> None:
    names = [t.name for t in tiers]
    if not names:
        raise InvalidSpec("spec.tiers", "name at least one tier")
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise InvalidSpec("spec.tiers", f"two tiers are named {repeated[0]}; rename one of them")
    if len(marked := [t.name for t in tiers if t.default]) > 1:
        raise InvalidSpec("spec.tiers", f"more than one tier has default true ({', '.join(marked)}); keep it on one of them")


def _allowed(spec: PoolSpec) -> tuple[int, ...]:
    path = "spec.tensorParallel.allowed"
    allowed = sorted(set((spec.tensor_parallel.allowed if spec.tensor_parallel else None) or []))
    if allowed and allowed[0] < 1:
        raise InvalidSpec(path, f"{allowed[0]} is not a TP; write whole numbers from 1 to 64")
    for smaller, larger in pairwise(allowed):
        if larger % smaller:
            raise InvalidSpec(path, f"{larger} is not a multiple of {smaller}; remove one of them", "IllegalTensorParallel")
    if allowed and allowed[0] > spec.budget.gpus:
        raise InvalidSpec(
            "spec.budget.gpus", f"{spec.budget.gpus} is below the smallest allowed TP {allowed[0]}; raise it to at least {allowed[0]}"
        )
    return tuple(allowed)


def pool_from_resource(obj: Mapping[str, Any]) -> tuple[Pool, ModelSpec]:
    """The planner's pool and the model of a ServingPool. Raises InvalidSpec with field path and remedy."""
    spec = pool_spec(obj)
    if spec.budget.gpus < 1:
        raise InvalidSpec("spec.budget.gpus", f"{spec.budget.gpus} is not a budget; write at least 1")
    _check_source(spec.model.source)
    tiers = tuple(_tier(i, t) for i, t in enumerate(spec.tiers))
    _check_tiers(tiers)
    meta = obj["metadata"]
    pool = Pool(
        name=f"{meta['namespace']}/{meta['name']}",
        uid=meta.get("uid", ""),
        model=spec.model.name,
        tiers=tiers,
        budget_gpus=spec.budget.gpus,
        node_selector=tuple(sorted((spec.budget.node_selector or {}).items())),
        allowed_tp=_allowed(spec),
        profile=spec.profile or "",
        mode=AdaptationMode((spec.adaptation.mode if spec.adaptation else None) or AdaptationMode.ACTIVE),
        # The pool's name is in it because engine ids hold only the beginning of a long one.
        checkpoint=sha256(f"{meta['namespace']}/{meta['name']} {spec.model.source.model_dump_json()}".encode()).hexdigest()[:6],
    )
    return pool, spec.model
