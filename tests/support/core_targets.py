"""What a test has another process do; here, because that process must be able to import it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path


def write_state(path: Path) -> None:
    names = ("LONGTAIL_TEST_LAUNCH", "LONGTAIL_TEST_LATER", "LONGTAIL_TEST_GONE", "LD_PRELOAD")
    lines = [f"{os.getpid()} {multiprocessing.current_process().name}"]
    path.write_text("\n".join([*lines, *(os.environ.get(name, "unset") for name in names)]), encoding="utf-8")


def exit_with(code: int) -> None:
    sys.exit(code)


def fail() -> None:
    raise RuntimeError("the core's own error")


def sleep_long() -> None:
    time.sleep(60)


def answer(connection: Connection) -> None:
    connection.send(os.getpid())
