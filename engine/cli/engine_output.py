"""Where the engine's own output goes: into a log file, so that the terminal shows the command's lines only.

vLLM, the libraries below it and the engine-core process write to the file descriptors 1 and 2: log lines, progress
bars of the weights, C++ messages, tracebacks. `engine_output_to` points both at a file while the engine lives, and
gives back a console on the terminal that was there before. longtail's own log lines, such as the one that says how
the CPU is used, are shown on that console.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from longtail.engine.trajectory_lines import named_os_error

_ERROR_LINE = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .+)$")
_TAIL_BYTES = 65_536


@contextlib.contextmanager
def engine_output_to(log: Path) -> Iterator[Console]:
    """Send what this process and its children print to `log`, made anew; the console inside still is the terminal's."""
    with named_os_error(log, "the engine's output cannot be written"):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    # A standard output that is not descriptor 1 (a test's, a notebook's) still goes where it went.
    own = sys.stdout if not _is_descriptor(sys.stdout, 1) else None
    terminal = own or os.fdopen(os.dup(kept[1]), "w", encoding="utf-8", errors="replace")
    console = Console(file=terminal)
    try:
        for number in kept:
            os.dup2(descriptor, number)
        with longtail_log_on(console):
            yield console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in kept.items():
            os.dup2(original, number)
            os.close(original)
        os.close(descriptor)
        if own is None:
            terminal.close()


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):  # what `io.UnsupportedOperation` is
        return False


#: Environment in which vLLM, and the torch below it, say only what is wrong.
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore::FutureWarning"}


def quiet_vllm() -> dict[str, Any]:
    """Let vLLM say only what is wrong, unless the user's environment decides; call it before vLLM is imported.

    Returns: fields of vLLM's `EngineArgs` that go with it.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)
    return {"use_tqdm_on_load": False}


@contextlib.contextmanager
def longtail_log_on(console: Console) -> Iterator[None]:
    """Show longtail's own log lines of this process, from INFO on; those of a process forked from it go to stderr."""
    own_pid = os.getpid()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if os.getpid() == own_pid:
                console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
            else:  # the console's lock may have been held when this process was forked
                sys.stderr.write(self.format(record) + "\n")

    logger = logging.getLogger("longtail")
    handler, before = Lines(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def last_error_in(log: Path) -> str | None:
    """The last line of the log that names an exception: the root cause that vLLM only points at."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    found = [match[1] for line in lines if (match := _ERROR_LINE.search(line))]
    return found[-1] if found else None
