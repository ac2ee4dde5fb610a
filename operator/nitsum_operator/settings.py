"""The operator's configuration file, as the chart writes it (config.yaml)."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nitsum.errors import InvalidSpec
from nitsum.planner.types import PlannerSettings

_PLANNER = {
    "dwellSeconds": "dwell_s",
    "cooldownSeconds": "cooldown_s",
    "gainMin": "gain_min",
    "headroomQuantile": "headroom_quantile",
    "staleAfterSeconds": "stale_after_s",
    "flipsAtOnceMax": "flips_at_once_max",
}
_ABOVE_0 = frozenset({"dwellSeconds", "headroomQuantile", "staleAfterSeconds", "flipsAtOnceMax"})
_BELOW_1, _WHOLE = frozenset({"headroomQuantile"}), frozenset({"flipsAtOnceMax"})
"""As the chart's schema has it: the planner would divide by 0, or change nothing ever."""
_SECRETS = {
    "ca": "nitsum-ca",
    "operator": "nitsum-operator-tls",
    "agent": "nitsum-agent-tls",
    "host": "nitsum-host-tls",
    "gateway": "nitsum-gateway-tls",
}


@dataclass(frozen=True)
class Settings:
    planner: PlannerSettings = PlannerSettings()
    health_port: int = 8080
    agents_service: str = "nitsum-agents"
    gateways_service: str = "nitsum-gateways"
    secrets: dict[str, str] = field(default_factory=lambda: dict(_SECRETS))
    online_correction: bool = True


def parse(raw: Any) -> Settings:
    """Raises InvalidSpec that names the key."""
    if not isinstance(raw, dict):
        raise InvalidSpec("config", "must be a YAML mapping")
    planner: dict[str, Any] = {}
    for key, value in (raw.get("planner") or {}).items():
        if key not in _PLANNER or isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InvalidSpec(f"planner.{key}", f"must be one of {', '.join(_PLANNER)}, with a number that is not negative")
        if (key in _ABOVE_0 and value == 0) or (key in _BELOW_1 and value >= 1) or (key in _WHOLE and value != int(value)):
            wanted = [text for keys, text in ((_ABOVE_0, "above 0"), (_BELOW_1, "below 1"), (_WHOLE, "whole")) if key in keys]
            raise InvalidSpec(f"planner.{key}", f"{value!r} must be {' and '.join(wanted)}")
        planner[_PLANNER[key]] = int(value) if key == "flipsAtOnceMax" else float(value)
    services = raw.get("services") or {}
    return Settings(
        PlannerSettings(**planner),
        int(raw.get("healthPort", 8080)),
        str(services.get("agents", "nitsum-agents")),
        str(services.get("gateways", "nitsum-gateways")),
        {**_SECRETS, **((raw.get("tls") or {}).get("secrets") or {})},
        bool((raw.get("profile") or {}).get("onlineCorrection", True)),
    )


def load(path: Path) -> Settings:
    return parse(yaml.safe_load(path.read_text()) or {})
