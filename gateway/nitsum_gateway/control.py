"""Control requests of SGLang's front: each that waits for a reply gets one. Two are true, the rest refuse: engines are not the front's."""

from collections.abc import Callable
from typing import Any

TRUE: dict[str, tuple[str, dict[str, Any]]] = {
    "FlushCacheReqInput": ("FlushCacheReqOutput", {"success": True, "message": "the gateway holds no cache"}),
    "GetInternalStateReq": ("GetInternalStateReqOutput", {"internal_state": {"nitsum": "router"}}),
    "ProfileReq": ("ProfileReqOutput", {"success": False, "message": "not at the gateway"}),
}
WORDS = {"message": "not at the gateway", "error_message": "not at the gateway", "error": "not at the gateway"}
BLANKS: dict[str, Any] = {"bool": False, "str": "", "int": 0}


def reply_to(io: Any, fields: Callable[[Any], Any], message: Any) -> Any | None:
    """SGLang's reply struct; None where nobody waits (pause, continue, freeze, logging)."""
    name = type(message).__name__
    known, told = TRUE.get(name, ("", {}))
    kind = getattr(io, known or name.removesuffix("Input") + "Output", None)
    if kind is None:
        return None
    values = dict(told)
    if not known:
        for f in fields(kind):
            if f.required or f.name in WORDS or f.name in ("success", "updated"):
                values[f.name] = WORDS.get(f.name, BLANKS.get(getattr(f.type, "__name__", "")))
    return kind(**{**values, "rid": getattr(message, "rid", None), "http_worker_ipc": getattr(message, "http_worker_ipc", None)})
