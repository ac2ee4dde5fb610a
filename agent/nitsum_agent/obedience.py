"""What an agent makes of a directive, given what it obeyed before: accept, answer as before, or reject with a typed reason. Pure."""

from dataclasses import dataclass, field

from nitsum_api import CONTRACT_VERSION
from nitsum_api.agent.v1 import agent_pb2
from nitsum_api.types.v1 import types_pb2

Reason = agent_pb2.ApplyResponse.Rejected.Reason
NUMBER_MAX = (1 << 62) - 1
"""Of terms and generations: whoever comes next must be able to take a higher one, and Kubernetes' integers are signed."""
REMEMBERED_MAX = 64
"""Operation ids whose answer is remembered; older ones are covered by their generation."""


@dataclass
class Memory:
    """What the journal holds. `answers` maps operation ids to their answers, oldest first.

    `directive` and `generation` are what is in force; `pending` was found good but the host has not answered it yet.
    """

    highest_term: int = 0
    generation: int = 0
    directive: agent_pb2.NodeDirective | None = None
    pending: agent_pb2.NodeDirective | None = None
    answers: dict[str, agent_pb2.ApplyResponse] = field(default_factory=dict)

    def saw(self, term: int) -> None:
        self.highest_term = max(self.highest_term, term)

    def found_good(self, directive: agent_pb2.NodeDirective) -> None:
        self.saw(directive.term)
        self.pending = directive

    def answered(self, directive: agent_pb2.NodeDirective, answer: agent_pb2.ApplyResponse) -> None:
        """The host's word: only now is the directive in force, or refused for good."""
        self.saw(directive.term)
        self.pending = None
        if answer.WhichOneof("answer") != "rejected":
            self.generation = max(self.generation, directive.generation)
            self.directive = directive
        self.answers.pop(directive.operation_id, None)
        self.answers[directive.operation_id] = answer
        while len(self.answers) > REMEMBERED_MAX:
            self.answers.pop(next(iter(self.answers)))


def rejected(reason: "Reason.ValueType", message: str, highest_term: int = 0) -> agent_pb2.ApplyResponse:
    return agent_pb2.ApplyResponse(rejected=agent_pb2.ApplyResponse.Rejected(reason=reason, message=message, highest_term=highest_term))


def unknown_values(d: agent_pb2.NodeDirective) -> str:
    """The first enum value of a later release: half understood is worse than refused."""
    if d.mode not in types_pb2.FlipMode.values():
        return f"mode {d.mode}"
    return next((f"layout: role {g.role} of group {g.group_id}" for g in d.layout if g.role not in types_pb2.Role.values()), "")


def late(directive: agent_pb2.NodeDirective, now_s: float) -> bool:
    return directive.HasField("deadline") and directive.deadline.ToNanoseconds() / 1e9 < now_s


def too_late(memory: Memory) -> agent_pb2.ApplyResponse:
    return rejected(Reason.REASON_DEADLINE_PASSED, "the deadline is in the past: plan again, or set the clocks", memory.highest_term)


def news(memory: Memory, contract_version: str, term: int) -> bool:
    """Whether this term must be on disk before the answer: a leader that was heard once outranks the ones before, whatever the answer."""
    return contract_version == CONTRACT_VERSION and memory.highest_term < term <= NUMBER_MAX


def judge(
    memory: Memory, request: agent_pb2.ApplyRequest, now_s: float, gpu_uuids: frozenset[str] | None
) -> agent_pb2.ApplyResponse | None:
    """The answer, or None: journal it and hand it to the host. `now_s`: Unix time; GPUs not known yet (None) are not checked."""
    d = request.directive
    if request.contract_version != CONTRACT_VERSION:
        text = f"this agent speaks contract {CONTRACT_VERSION}, the caller {request.contract_version or 'none'}: upgrade the older side"
        return rejected(Reason.REASON_CONTRACT_VERSION, text, memory.highest_term)
    if d.term < memory.highest_term:
        text = f"term {d.term} is over: a leader of term {memory.highest_term} was here; take a higher one"
        return rejected(Reason.REASON_STALE_TERM, text, memory.highest_term)
    if not d.operation_id or d.term == 0 or d.generation == 0:
        return rejected(Reason.REASON_INVALID, "operation_id, term and generation must be set", memory.highest_term)
    if max(d.term, d.generation) > NUMBER_MAX:
        return rejected(Reason.REASON_INVALID, f"term and generation must be at most {NUMBER_MAX}", memory.highest_term)
    if strange := unknown_values(d):
        return rejected(
            Reason.REASON_INVALID, f"{strange} is not known to this agent: bring agent and operator to one release", memory.highest_term
        )
    if (before := memory.answers.get(d.operation_id)) is not None:
        if before.WhichOneof("answer") != "rejected":
            return agent_pb2.ApplyResponse(already_done=agent_pb2.ApplyResponse.AlreadyDone())
        return before
    if d.generation <= memory.generation:
        text = f"generation {d.generation} is not above {memory.generation}, which is in force"
        return rejected(Reason.REASON_STALE_GENERATION, text, memory.highest_term)
    if late(d, now_s):
        return too_late(memory)
    wanted = {u for g in d.layout for u in g.gpu_uuids} | {u for e in d.residency for u in e.gpu_uuids}
    if gpu_uuids is not None and (unknown := wanted - gpu_uuids):
        text = f"GPUs {sorted(unknown)} are not on this node; it has {sorted(gpu_uuids)}"
        return rejected(Reason.REASON_UNKNOWN_GPU, text, memory.highest_term)
    return None
