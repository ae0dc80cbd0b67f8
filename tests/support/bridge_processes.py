"""A bridge service and a trainer in processes of their own, as users start them, to be killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

READY_PREFIX = "LONGTAIL_BRIDGE "
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0

ENGINE_OPTIONS = (
    "--block-size", "32", "--max-model-len", "256", "--max-num-seqs", "16", "--kv-cache-gib", "0.02",
    "--omp-threads", "1",
)  # fmt: skip


class Process:
    """A command whose output goes to a file, one start after the other."""

    def __init__(self, command: Sequence[str], log_file: Path) -> None:
        self.command = list(command)
        self.log_file = log_file
        self.num_starts = 0
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        return None if self._popen is None else self._popen.poll()

    def start(self) -> None:
        assert not self.is_running
        self.num_starts += 1
        with self.log_file.open("ab") as log:
            log.write(f"---- start {self.num_starts} ----\n".encode())
            log.flush()
            self._popen = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to it alone, as the kernel's would be; its children notice for themselves."""
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                self._popen.kill()
            self._popen.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._popen is not None
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGTERM)
        return self._popen.wait(STOP_TIMEOUT_S)

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._popen is not None:
                return psutil.Process(self._popen.pid).children(recursive=True)
        return []

    def kill_all(self) -> None:
        left = self.descendants()
        self.kill()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def log_tail(self, num_chars: int = 4000) -> str:
        return self.log_file.read_text(errors="replace")[-num_chars:] if self.log_file.exists() else ""


class ServiceProcess(Process):
    """`longtail serve --bridge`, with a state folder, on the same port after each start."""

    def __init__(self, model: Path, folder: Path, options: Sequence[str] = ()) -> None:
        self.address = "tcp://127.0.0.1:0"
        self._fixed = [
            sys.executable, "-m", "longtail.engine.cli", "serve", "--model", str(model), *ENGINE_OPTIONS,
            "--state", str(folder / "state"), *options,
        ]  # fmt: skip
        super().__init__([], folder / "service.log")
        self.ready: dict[str, Any] = {}

    def start(self) -> None:
        self.command = [*self._fixed, "--bridge", self.address]
        super().start()

    def wait_ready(self) -> ServiceProcess:
        """Until it has said where it is."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.is_running:
            since_start = self.log_file.read_text(errors="replace").rpartition("---- start ")[2]
            for line in since_start.splitlines(keepends=True):
                if line.startswith(READY_PREFIX) and line.endswith("\n"):
                    self.ready = json.loads(line.removeprefix(READY_PREFIX))
                    self.address = self.ready["address"]
                    return self
            time.sleep(0.05)
        raise AssertionError(f"the service is not ready:\n{self.log_tail()}")

    def core_process(self) -> psutil.Process | None:
        """The engine core: the descendant that has the model loaded."""
        sizes: list[tuple[int, psutil.Process]] = []
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append((process.memory_info().rss, process))
        return max(sizes, key=lambda pair: pair[0])[1] if sizes else None


def trainer_process(address: str, model: Path, folder: Path, broken_share: float = 0.0) -> Process:
    script = Path(__file__).with_name("chaos_trainer.py")
    command = [sys.executable, str(script), address, str(folder), str(model), str(broken_share)]
    return Process(command, folder / "trainer.log")
