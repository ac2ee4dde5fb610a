"""All condition types and reasons of nitsum's resources, each with its meaning: the one documented place.

`python -m nitsum_api.conditions > docs/conditions.md` writes the page that people read; a test keeps it current.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol


class PoolCondition(StrEnum):
    """Condition types of a ServingPool, the most urgent first: the order in which `summary_reason` looks at them."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> "PoolCondition":
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    ACCEPTED = "Accepted", "The spec makes sense and is the one that is acted on. False: what ran before stays."
    READY = "Ready", "At least one group serves the pool, or will when the flip that runs now is over."
    DEGRADED = "Degraded", "Something that should work does not; the message names it. Serving goes on with what is left."
    AGENTS_CONNECTED = "AgentsConnected", "Every agent that the pool may use reports."
    FEASIBLE = "Feasible", "The plan expects every tier to reach its target within the budget."
    PROGRESSING = "Progressing", "What runs is on its way to the plan."


class NodeCondition(StrEnum):
    """Condition types of a ServingNode."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> "NodeCondition":
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    CONNECTED = "Connected", "The agent reports and speaks the operator's contract version."
    SERVING = "Serving", "At least one group of the node serves."


class Reason(StrEnum):
    """Reasons of all conditions. `of` names the condition types (and their status) that use it."""

    of: str
    meaning: str

    def __new__(cls, value: str, of: str, meaning: str) -> "Reason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.of = of
        member.meaning = meaning
        return member

    ACCEPTED = "Accepted", "Accepted=True", "The spec is valid and in force."
    INVALID_SPEC = (
        "InvalidSpec",
        "Accepted=False",
        "A field is wrong in a way that the API server did not see; the message names it and its legal values.",
    )
    ILLEGAL_TENSOR_PARALLEL = (
        "IllegalTensorParallel",
        "Accepted=False",
        "An allowed TP does not divide the model's heads or widths; the message names the legal ones.",
    )
    MODEL_NAME_TAKEN = "ModelNameTaken", "Accepted=False", "An older pool serves a model of this name; rename one of them."
    UNSUPPORTED_MODEL = "UnsupportedModel", "Accepted=False", "The checkpoint cannot be served, or not be found; the message says why."
    UNKNOWN_PROFILE = (
        "UnknownProfile",
        "Accepted=False",
        "There is no step-time profile of that name, or none of the model on these GPUs; the message lists those there are.",
    )
    MODEL_FACTS_PENDING = (
        "ModelFactsPending",
        "Accepted=Unknown",
        "No agent has read the model yet, or none reports; what ran before stays.",
    )

    SERVING = "Serving", "Ready=True, Serving=True", "Requests are served."
    AWAITING_PLAN = "AwaitingPlan", "Ready=False", "The spec was accepted; the first plan is being made."
    AWAITING_ENGINES = "AwaitingEngines", "Ready=False, Serving=False", "Engines are being started, warmed up and timed."
    NO_AGENTS = "NoAgents", "Ready=False, AgentsConnected=False", "No node with an agent matches spec.budget.nodeSelector."
    NOT_ENOUGH_GPUS = "NotEnoughGpus", "Ready=False, Degraded=True", "Fewer GPUs are free than the smallest allowed TP, or than the budget."
    NOT_ACCEPTED = "NotAccepted", "Ready=False, Progressing=False", "No spec was accepted yet, so nothing runs; see Accepted."
    ENGINES_FAILED = (
        "EnginesFailed",
        "Ready=False, Degraded=True",
        "Engines do not start or end again and again; the message has the last error.",
    )

    PLANNED = "Planned", "Progressing=False", "What runs is what the plan wants."
    FLIPPING = "Flipping", "Progressing=True", "A flip between warm engines is running."
    CHANGING_RESIDENCY = "ChangingResidency", "Progressing=True", "Engines are being started or stopped, a cold operation."
    PLAN_BLOCKED = "PlanBlocked", "Progressing=False", "A safe plan cannot be made now; what runs stays. The message says what is awaited."
    ADVISORY = "Advisory", "Progressing=False", "The planner would change the layout, but spec.adaptation.mode does not let it."

    WITHIN_BUDGET = "WithinBudget", "Feasible=True", "Every tier is expected to reach its target."
    SLO_INFEASIBLE = (
        "SloInfeasible",
        "Feasible=False",
        "A tier's target is out of reach with this budget; the message names the tier and what limits it.",
    )
    NO_PLAN_YET = "NoPlanYet", "Feasible=Unknown, Progressing=False", "Nothing has been planned yet."

    ALL_CONNECTED = "AllConnected", "AgentsConnected=True, Connected=True", "Reports arrive."
    AGENT_LOST = (
        "AgentLost",
        "AgentsConnected=False, Connected=False, Degraded=True, Ready=Unknown",
        "An agent cannot be reached; its GPUs count as used.",
    )
    STALE_REPORTS = (
        "StaleReports",
        "AgentsConnected=False, Connected=False, Degraded=True, Ready=Unknown",
        "Reports are too old to plan with.",
    )
    CONTRACT_VERSION_MISMATCH = (
        "ContractVersionMismatch",
        "AgentsConnected=False, Connected=False, Degraded=True",
        "A peer speaks another contract version and is left alone; bring it and the operator to one release.",
    )
    WRONG_IDENTITY = (
        "WrongIdentity",
        "AgentsConnected=False, Connected=False, Degraded=True",
        "The peer's certificate is not of the role that it should be, or an agent claims the Node, Pod or id of another one.",
    )
    HOST_UNAVAILABLE = "HostUnavailable", "Connected=False, Degraded=True", "The agent reports, but its engine host does not answer."
    DRAINING = (
        "Draining",
        "Serving=False, Degraded=True",
        "What runs on the node goes elsewhere: its Node is tainted nitsum.io/drain, or its engine host was told to drain.",
    )
    IDLE = "Idle", "Serving=False", "No pool has a group here."

    DIRECTIVE_REJECTED = "DirectiveRejected", "Degraded=True", "An agent refused a directive; the message has its reason."
    FLIP_REVERTED = "FlipReverted", "Degraded=True", "The new layout did not wake, so the old one serves again."
    HEALTHY = "Healthy", "Degraded=False", "Nothing known to be wrong."


class EventReason(StrEnum):
    """Reasons of Events that are not those of a condition."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> "EventReason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    LAYOUT_PLANNED = "LayoutPlanned", "The plan wants another layout; the note says which, and why."
    FLIPPED = "Flipped", "A flip is done; the note names the node, both layouts, streams that moved and the host's pause."
    FLIP_FAILED = "FlipFailed", "A flip was reverted or failed; the message of Degraded says why."


class ConditionLike(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...


_GOOD = {PoolCondition.DEGRADED: "False", PoolCondition.PROGRESSING: "False"}


def summary_reason(conditions: Sequence[ConditionLike]) -> str:
    """What `kubectl get` shows under REASON: the first condition that is not as wished, in order of urgency; else that of Ready."""
    by_type = {c.type: c for c in conditions}
    for kind in PoolCondition:
        found = by_type.get(kind)
        if found is not None and found.status != _GOOD.get(kind, "True"):
            return found.reason
    return by_type[PoolCondition.READY].reason if PoolCondition.READY in by_type else ""


def as_markdown() -> str:
    """The text of docs/conditions.md."""
    lines = [
        "# Conditions",
        "",
        "What `status.conditions` of a ServingPool and of a ServingNode say. Generated from `proto/nitsum_api/conditions.py`.",
        "",
        "## Types of a ServingPool",
        "",
        "`kubectl get servingpools` shows under REASON that of the first one, in this order, that is not as wished.",
        "",
        "| Type | Meaning |",
        "| --- | --- |",
        *(f"| `{c.value}` | {c.meaning} |" for c in PoolCondition),
        "",
        "## Types of a ServingNode",
        "",
        "| Type | Meaning |",
        "| --- | --- |",
        *(f"| `{c.value}` | {c.meaning} |" for c in NodeCondition),
        "",
        "## Reasons",
        "",
        "| Reason | Of | Meaning |",
        "| --- | --- | --- |",
        *(f"| `{r.value}` | {r.of} | {r.meaning} |" for r in Reason),
        "",
        "## Events of a ServingPool",
        "",
        "`kubectl describe` shows them: the reasons above when Accepted, Ready or Degraded turns, and these. 16 at once, then one in 30 s;",
        "the status has all.",
        "",
        "| Reason | Meaning |",
        "| --- | --- |",
        *(f"| `{r.value}` | {r.meaning} |" for r in EventReason),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown(), end="")
