"""How a server starts, ends and fails: nothing of it may stay behind."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_process import ServerProcess, running_server, still_alive

LONG_ROUND = {
    "prompts": [{"token_ids": [1, 2, 3], "max_tokens": 3}, *[{"token_ids": [1, 2, 3]}] * 31],
    "sampling": {"max_tokens": 500, "ignore_eos": True},
    "round_id": "long",
}


class Reader:
    """Reads a round in a thread; `lines` and the time of each."""

    def __init__(self, server: ServerProcess) -> None:
        self.lines: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.first = threading.Event()
        self.ended_whole = False
        self.thread = threading.Thread(target=self._read, args=(server,))
        self.thread.start()
        assert self.first.wait(60)

    def _read(self, server: ServerProcess) -> None:
        with server.client() as client, client.stream("POST", "/v1/rollouts", json=LONG_ROUND) as response:
            for line in response.iter_lines():
                self.lines.append(json.loads(line))
                self.times.append(time.monotonic())
                self.first.set()
        self.ended_whole = True


def test_sigterm_in_a_round_ends_the_server_and_every_process(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "log") as server:
        assert server.ready.keys() == {"host", "port", "model", "pid"}
        assert server.ready["pid"] == server.process.pid
        reader = Reader(server)
        processes = server.descendants()
        assert processes
        started = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 30
        reader.thread.join(10)
        assert not still_alive(processes)
    # Whoever was served has been told, in a whole line.
    assert reader.lines[0]["type"] == "trajectory"
    assert reader.lines[-1]["type"] == "error"
    assert reader.lines[-1]["error"]["type"] == "EngineDeadError"
    assert reader.ended_whole


def test_a_killed_engine_core_is_an_error_line_within_ten_seconds(tiny_model: Path, tmp_path: Path) -> None:
    with running_server(tiny_model, tmp_path / "log") as server:
        reader = Reader(server)
        processes = server.descendants()
        killed = time.monotonic()
        server.core_process().kill()
        reader.thread.join(10)
        assert reader.lines[-1]["type"] == "error"
        assert reader.times[-1] - killed < 10
        error = reader.lines[-1]["error"]
        assert (error["type"], error["code"]) == ("EngineDeadError", 503)
        assert "31 trajectories" in error["message"]
        # Every line before it is a whole trajectory.
        assert {line["type"] for line in reader.lines[:-1]} == {"trajectory"}
        # The server does not stay to answer for a dead engine, and says so with its exit code.
        assert server.process.wait(30) != 0
        assert not still_alive(processes)
        with pytest.raises(httpx.TransportError), server.client(timeout=5.0) as client:
            client.get("/health")


@pytest.mark.parametrize(("number", "wait_for_core"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_server_that_is_told_to_stop_while_it_starts_leaves_nothing(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, wait_for_core: bool
) -> None:
    """While it imports, and while it waits for its core to load the model."""
    server = ServerProcess(tiny_model, tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not (has_core(server) if wait_for_core else server.descendants()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes = server.descendants()
        assert server.stop(number) == 0
        assert not server.ready
        assert not still_alive(processes)
    finally:
        server.kill()


def has_core(server: ServerProcess) -> bool:
    """vLLM's core is at work: it has taken its name."""
    with contextlib.suppress(psutil.Error):
        return any("EngineCore" in part for process in server.descendants() for part in process.cmdline())
    return False
