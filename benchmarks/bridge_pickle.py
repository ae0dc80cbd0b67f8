"""Baseline of `bridge.py`: trajectories pickled over ZeroMQ, as `send_pyobj` does it.

The one place of the project that knows pickle, to measure it on data that it has pickled itself. A worker of
`bench_io.Worker`: `{"count": N}` sends N trajectories once.
"""

from __future__ import annotations

import json
import pickle  # noqa: TID251
import sys
from typing import Any

import zmq
from bridge_sample import sample_round

from longtail.engine.trajectory import Trajectory


def receive(socket: zmq.Socket[bytes], count: int) -> list[Trajectory]:
    """So many trajectories, as the objects that a trainer works with."""
    return [pickle.loads(socket.recv()) for _ in range(count)]


def main() -> None:
    """Serve rounds on a port of the system's choice."""
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(json.dumps({"address": f"tcp://127.0.0.1:{port}"}), flush=True)
    trajectories: list[Any] = []
    for line in sys.stdin:
        count = json.loads(line)["count"]
        if len(trajectories) != count:
            trajectories = sample_round("r", count).trajectories
            print(json.dumps({"ready": True}), flush=True)
            continue
        print(json.dumps({"started": True}), flush=True)
        for trajectory in trajectories:
            socket.send(pickle.dumps(trajectory, protocol=5), copy=False)


if __name__ == "__main__":
    main()
