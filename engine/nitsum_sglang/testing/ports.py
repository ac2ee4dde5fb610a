"""Ports for servers that bind them later, and again after a kill: never handed out twice, never taken by a client meanwhile.

`bind(0)` promises neither. It takes from the range out of which the kernel also serves every outgoing connection and everybody
else's `bind(0)`; a server that needs half a minute until it binds, or is killed and started again, finds its port taken.
"""

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, HIGHEST = 12000, 29999
"""Below Kubernetes' node ports (30000-32767) and Linux' default ephemeral range (32768-60999)."""

_held: dict[int, socket.socket] = {}


def _claim(port: int) -> bool:
    """Whether nobody else has it: a name that the kernel keeps while this process lives, in the namespace that ports are in."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0nitsum-port-{port}")
    except OSError:
        claim.close()
        return False
    _held[port] = claim
    return True


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """`count` ports that nobody listens on at `address`, this process' own until it ends. Raises RuntimeError if there are too few."""
    candidates = range(LOWEST, HIGHEST + 1)
    with contextlib.suppress(OSError):  # not Linux
        first_ephemeral = int(_RANGE.read_text().split()[0])
        candidates = range(LOWEST, min(HIGHEST + 1, first_ephemeral)) or candidates
    ports: list[int] = []
    for port in random.sample(candidates, min(len(candidates), 1000)):
        if len(ports) == count:
            break
        if port in _held or not _claim(port):
            continue
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what waits in TIME_WAIT does not count
            try:
                s.bind((address, port))
            except OSError:  # a stranger's; kept claimed, so that it is not tried again
                continue
        ports.append(port)
    if len(ports) < count:
        raise RuntimeError(f"only {len(ports)} of {count} ports are free on {address} in {LOWEST}-{HIGHEST}")
    return ports
