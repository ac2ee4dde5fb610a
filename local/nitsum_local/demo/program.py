"""What the demo serves and sends: the model, its pool, and three acts of traffic: its mix asks for one TP, for another, for the first."""

from dataclasses import dataclass, replace

from nitsum_local.demo.traffic import Load
from nitsum_local.stage import NodeSpec

PLANNER = {"dwellSeconds": 20, "cooldownSeconds": 5}
"""Shorter than the chart's defaults: a demo lasts minutes."""


@dataclass(frozen=True)
class Act:
    """`until_flips`: ends that many flips after the demo began, but not before `least_s`; at `most_s` in any case."""

    headline: str
    loads: tuple[Load, ...]
    until_flips: int
    least_s: float
    most_s: float


@dataclass(frozen=True)
class Program:
    """`others`: (example, checkpoint) of pools that are served beside `example` and get no traffic."""

    checkpoint: str
    example: str
    nodes: tuple[NodeSpec, ...]
    tiers: tuple[str, ...]
    acts: tuple[Act, ...]
    others: tuple[tuple[str, str], ...] = ()
    max_total_tokens: int = 4096
    """KV tokens of each engine: the traffic needs some 800, and pages that a process first writes to cost it time."""


def _acts(interactive: Load, agents: Load, few: Load, linger_s: float, most_s: float) -> tuple[Act, ...]:
    return (
        Act("interactive traffic: its TPOT asks for wide groups", (interactive,), 0, linger_s, most_s),
        Act("agents take over: many streams at a looser TPOT", (agents,), 1, linger_s, most_s),
        Act("interactive traffic is back", (interactive, few), 2, linger_s, most_s),
    )


SMOLLM2 = Program(
    "smollm2",
    "chat",
    (NodeSpec("node-0", 3), NodeSpec("node-1", 2)),
    ("interactive", "agents"),
    # The planner knows how long agents' answers are when the first of them ends, and flips then.
    _acts(Load("interactive", 0.25, 24, 2), Load("agents", 1.0, 48, 8), Load("agents", 0.05, 48, 1), 6, 90),
    others=(("tiny", "tiny"),),
)
TINY = Program(
    "tiny",
    "tiny",
    (NodeSpec("node-0", 2), NodeSpec("node-1", 2)),
    ("interactive", "agents"),
    _acts(Load("interactive", 0.5, 48, 3), Load("agents", 3.0, 128, 8), Load("agents", 0.3, 128, 2), 4, 90),
)
BRIEF = replace(
    TINY,
    nodes=(NodeSpec("node-0", 2), NodeSpec("node-1", 1)),
    acts=(Act("a moment of everything", (Load("interactive", 2, 16, 2), Load("agents", 2, 32, 2)), 0, 2, 2),),
)
"""For tests that interrupt the demo: every phase, both kinds of engine, no waiting for a flip."""
PROGRAMS = {"smollm2": SMOLLM2, "tiny": TINY, "brief": BRIEF}
