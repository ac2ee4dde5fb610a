"""Which group takes a request, and what becomes of a request whose group ends under it. Pure: the simulator runs this very code.

`Routes` holds the groups, `decide` orders those that may take it, `affinity` says which may have its KV. `Stream` owns one request from
arrival to end: every token the client gets is one that an engine generated right after those before it; none is lost, none repeated,
however often it moves.
"""

from nitsum.routing.choose import FROM_STORE, GAP, Choice, decide
from nitsum.routing.messages import (
    Abort,
    ClientGone,
    Command,
    Crashed,
    Deliver,
    Done,
    Event,
    Fail,
    Finished,
    Moved,
    NodeLost,
    Refused,
    Retried,
    Retry,
    Submit,
    Tokens,
)
from nitsum.routing.routes import Rank, Routes, View
from nitsum.routing.stream import HOPS_MAX, RETRY_S, RETRY_S_MAX, WAIT_S_MAX, Stream
from nitsum.routing.view import AdmissionClass, GroupView, Key, Warm

__all__ = [
    "FROM_STORE",
    "GAP",
    "HOPS_MAX",
    "RETRY_S",
    "RETRY_S_MAX",
    "WAIT_S_MAX",
    "Abort",
    "AdmissionClass",
    "Choice",
    "ClientGone",
    "Command",
    "Crashed",
    "Deliver",
    "Done",
    "Event",
    "Fail",
    "Finished",
    "GroupView",
    "Key",
    "Moved",
    "NodeLost",
    "Rank",
    "Refused",
    "Retried",
    "Retry",
    "Routes",
    "Stream",
    "Submit",
    "Tokens",
    "View",
    "Warm",
    "decide",
]
