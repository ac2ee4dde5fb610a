"""Ports that the demo's and the tests' servers bind half a minute later, and again after a kill."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nitsum_sglang.testing import ports

CLAIMED = "import sys; from nitsum_sglang.testing import ports; ports.LOWEST, ports.HIGHEST = {}, {}; print(ports.free_ports(1)[0])"


def test_no_port_is_handed_out_twice_or_lies_where_clients_get_theirs() -> None:
    first, second = ports.free_ports(20), ports.free_ports(20)
    assert len({*first, *second}) == 40
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert ephemeral <= ports.HIGHEST or all(ports.LOWEST <= p < ephemeral for p in first + second)


def test_another_process_does_not_get_it_although_nobody_listens() -> None:
    port = ports.free_ports(1)[0]
    other = subprocess.run([sys.executable, "-c", CLAIMED.format(port, port)], capture_output=True, text=True)
    assert other.returncode
    assert "only 0 of 1 ports are free" in other.stderr


def test_what_a_stranger_listens_on_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ports.free_ports(1)[0]
    monkeypatch.setattr(ports, "LOWEST", port)
    monkeypatch.setattr(ports, "HIGHEST", port)
    ports._held.pop(port).close()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with pytest.raises(RuntimeError, match="only 0 of 1"):
            ports.free_ports(1)
    ports._held.pop(port).close()
    assert ports.free_ports(1) == [port]
