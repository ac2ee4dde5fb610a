"""What the demo does, in this order; Ctrl-C at the entry of each leaves nothing behind (tests/e2e/test_demo_interrupt.py)."""

from enum import StrEnum


class Phase(StrEnum):
    PREFLIGHT = "preflight"
    BINARIES = "binaries"
    MODELS = "models"
    CONTROL_PLANE = "control plane"
    CHART = "chart"
    OPERATOR = "operator"
    GATEWAY = "gateway"
    NODES = "nodes"
    POOLS = "pools"
    TRAFFIC = "traffic"
    REFERENCE = "reference"
    SUMMARY = "summary"
