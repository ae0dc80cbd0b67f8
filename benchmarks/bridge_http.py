"""Baseline of `bridge.py`: trajectories as JSON lines over HTTP, with msgspec's JSON, the fastest there is for Python.

A worker of `bench_io.Worker`: `{"count": N}` prepares rounds of N trajectories; GET / streams one.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import AsyncIterator

import httpx
import msgspec
import uvicorn
from bridge_sample import sample_round
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from longtail.engine.server.settings import bind
from longtail.engine.trajectory import Trajectory

_decoder = msgspec.json.Decoder(Trajectory)


def receive(client: httpx.Client, count: int) -> list[Trajectory]:
    """One round."""
    trajectories: list[Trajectory] = []
    rest = b""
    with client.stream("GET", "/") as response:
        for part in response.iter_raw():
            *lines, rest = (rest + part).split(b"\n")
            trajectories += [_decoder.decode(line) for line in lines]
    assert len(trajectories) == count
    return trajectories


def main() -> None:
    """Serve rounds on a port of the system's choice."""
    trajectories: list[Trajectory] = []

    async def stream(_: Request) -> StreamingResponse:
        async def lines() -> AsyncIterator[bytes]:
            for trajectory in trajectories:
                yield msgspec.json.encode(trajectory) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    listener = bind("127.0.0.1", 0)
    listener.listen()
    config = uvicorn.Config(Starlette(routes=[Route("/", stream)]), log_level="error", loop="uvloop")
    threading.Thread(target=uvicorn.Server(config).run, args=([listener],), daemon=True).start()
    print(json.dumps({"address": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
    for line in sys.stdin:
        trajectories[:] = sample_round("r", json.loads(line)["count"]).trajectories
        print(json.dumps({"ready": True}), flush=True)


if __name__ == "__main__":
    main()
