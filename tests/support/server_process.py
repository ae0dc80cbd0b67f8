"""A server in a process of its own, as a user starts it, and what tests need to know of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

API_KEY = "test-key"
MAX_BODY_BYTES = 1 << 20
MAX_MEMBERS = 512
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
READY_PREFIX = "LONGTAIL_SERVING "


class ServerProcess:
    """Starts a server on a port that the system picks."""

    def __init__(self, model: Path, log_file: Path, engine: Mapping[str, Any] | None = None, **serve: Any) -> None:
        arguments = {
            "engine": {"model": str(model), "block_size": 32, "max_model_len": 512, "max_num_seqs": 32}
            | {"kv_cache_gib": 0.25}
            | dict(engine or {}),
            "serve": {"port": 0, "api_key": API_KEY} | serve,
        }
        script = Path(__file__).with_name("run_server.py")
        self.log_file = log_file
        self.model = str(model)
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(arguments)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read_stdout, daemon=True).start()
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> ServerProcess:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=0.2)
                if line.startswith(READY_PREFIX):
                    self.ready = json.loads(line.removeprefix(READY_PREFIX))
                    return self
        raise AssertionError(f"the server is not ready:\n{self.log_file.read_text(errors='replace')[-4000:]}")

    @property
    def base_url(self) -> str:
        return f"http://{self.ready['host']}:{self.ready['port']}"

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        return httpx.Client(**{"base_url": self.base_url, "headers": headers, "timeout": 120.0} | options)

    def metrics(self) -> dict[str, float]:
        """longtail's series without labels."""
        with self.client() as client:
            text = client.get("/metrics").raise_for_status().text
        series = (line.split() for line in text.splitlines() if line.startswith("longtail_"))
        return {name: float(value) for name, value in series}

    def wait_idle(self, timeout_s: float = 60.0) -> dict[str, float]:
        """The metrics once nothing runs or waits."""
        deadline = time.monotonic() + timeout_s
        while True:
            metrics = self.metrics()
            busy = ("longtail_running_requests", "longtail_waiting_requests", "longtail_live_members")
            if not any(metrics[name] for name in busy):
                return metrics
            assert time.monotonic() < deadline, metrics
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def core_process(self) -> psutil.Process:
        """The engine core: the descendant that has the model loaded."""
        return max(self.descendants(), key=lambda process: process.memory_info().rss)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """Leave nothing behind, whatever happened."""
        left = self.descendants()
        for process in [self.process, *left]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)


def still_alive(processes: list[psutil.Process], timeout_s: float = 10.0) -> list[psutil.Process]:
    """Those of `processes` that do not end in time."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def running_server(model: Path, log_file: Path, **options: Any) -> Iterator[ServerProcess]:
    """A ready server; killed at the end if the test has not stopped it."""
    server = ServerProcess(model, log_file, **options)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


def read_lines(response: httpx.Response) -> list[dict[str, Any]]:
    """The lines of an NDJSON answer that came whole."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]
