"""What `bridge.py` compares pushes by ZeroMQ with: the same bytes over a bare socket, neither checked nor kept.

A worker of `bench_io.Worker`: `{"num_bytes": N}` gets an answer at once, then takes N bytes and says so on the socket.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import zmq

_CHUNK_BYTES = 1 << 20


def send(socket: zmq.Socket[bytes], arrays: Iterable[np.ndarray[Any, Any]]) -> None:
    """All bytes of the arrays; returns when they have been received."""
    for array in arrays:
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, len(data), _CHUNK_BYTES):
            socket.send(data[start : start + _CHUNK_BYTES], copy=False)
    socket.recv()


def main() -> None:
    """Receive at a port of the system's choice."""
    socket = zmq.Context().socket(zmq.PAIR)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(json.dumps({"address": f"tcp://127.0.0.1:{port}"}), flush=True)
    for line in sys.stdin:
        left = json.loads(line)["num_bytes"]
        print(json.dumps({"started": True}), flush=True)
        while left > 0:
            left -= len(socket.recv(copy=False).buffer)
        socket.send(b"")


if __name__ == "__main__":
    main()
