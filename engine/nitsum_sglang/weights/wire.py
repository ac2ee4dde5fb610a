"""The framing of SGLang's weight-cache client: 4 bytes of length, big-endian, then a pickle. One user, one machine, plain values only.

What we read is unpickled without any class or function: numbers, strings, lists and dicts are all that a request needs.
"""

import io
import os
import pickle
import socket
import struct
from typing import Any

REQUEST_BYTES_MAX = 1 << 16


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"a request names {module_name}.{global_name}; plain values only")


def loads(data: bytes) -> Any:
    return _PlainUnpickler(io.BytesIO(data)).load()


def peer_uid(connection: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def receive(connection: socket.socket) -> Any:
    """One request. Raises OSError, ValueError or pickle.UnpicklingError; the connection has a timeout already."""
    if peer_uid(connection) != os.getuid():
        raise PermissionError("a peer of another user")
    (size,) = struct.unpack("!I", _exactly(connection, 4))
    if size > REQUEST_BYTES_MAX:
        raise ValueError(f"a request of {size} bytes; at most {REQUEST_BYTES_MAX}")
    return loads(_exactly(connection, size))


def send(connection: socket.socket, reply: dict[str, Any]) -> None:
    data = pickle.dumps(reply)
    connection.sendall(struct.pack("!I", len(data)) + data)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the peer left in the middle of a request")
        data += part
    return bytes(data)
