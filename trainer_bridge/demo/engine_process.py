"""An engine in a process of its own, as a trainer on the same machine starts one: `longtail serve --bridge`.

What the process says goes to a log file, where the line with its address is looked for. It ends when its parent does,
however that ends, and a signal from the terminal reaches only the parent, which then ends it in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from longtail.engine.cli.bridge import READY_PREFIX
from longtail.engine.cli.engine_output import last_error_in
from longtail.trainer_bridge.errors import LongtailError

_POLL_S = 0.1
_STOP_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1


class EngineProcessError(LongtailError):
    """The engine's process did not start, or ended by itself.

    Attributes:
        log: where it says why.

    """

    def __init__(self, message: str, log: Path) -> None:
        self.log = log
        cause = last_error_in(log)
        super().__init__(message + (f" ({cause})" if cause else "") + f"; its output is in {log}")


class _Ready(msgspec.Struct):
    address: str


class EngineProcess:
    """Starts the process and waits until it serves. Use it as a context manager.

    Args:
        model: a checkpoint folder, or a name that `longtail model` knows.
        options: further options of `longtail serve`.
        log: file for what it says, made anew.
        start_timeout_s: bound on the start.
        environ: of the process; this one's by default.

    Attributes:
        address: of the bridge.
        log: see above.

    Raises:
        EngineProcessError: it ended, or took too long.

    """

    def __init__(
        self,
        model: str,
        options: Sequence[str],
        log: Path,
        *,
        start_timeout_s: float = 300.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._on_death: Callable[[], None] | None = None
        self._is_stopping = False
        command = [sys.executable, "-m", "longtail.engine.cli", "serve", "--bridge", "tcp://127.0.0.1:0"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--model", model, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environ,
                preexec_fn=_die_with_parent(os.getpid()),
            )
        try:
            self.address = self._wait_for_address(start_timeout_s)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="engine-process", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def on_death(self, call: Callable[[], None]) -> None:
        """Have `call` called, in another thread, when the process ends without having been told to."""
        self._on_death = call
        if self._process.poll() is not None and not self._is_stopping:
            call()

    def raise_if_dead(self) -> None:
        """Raise an `EngineProcessError` if the process has ended."""
        code = self._process.poll()
        if code is not None and not self._is_stopping:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise EngineProcessError(f"the engine's process {self.pid} ended ({how})", self.log)

    def close(self) -> None:
        """End the process: with SIGTERM, and after a while with SIGKILL."""
        self._is_stopping = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_TIMEOUT_S)

    def _wait_for_address(self, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.log.read_text(errors="replace").splitlines():
                if line.startswith(READY_PREFIX):
                    return msgspec.json.decode(line.removeprefix(READY_PREFIX), type=_Ready).address
            self.raise_if_dead()
            time.sleep(_POLL_S)
        raise EngineProcessError(f"the engine was not ready after {timeout_s:g} s", self.log)

    def _watch(self) -> None:
        self._process.wait()
        if not self._is_stopping and self._on_death is not None:
            self._on_death()


def _die_with_parent(parent: int) -> Callable[[], None]:
    """What a child runs before its program: SIGTERM for it when its parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return arrange
