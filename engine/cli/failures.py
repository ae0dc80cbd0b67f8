"""What a failed command prints: one line that says what was wrong, and where it helps one more that says what to do.

Exit codes: 0 done, 1 the engine or the machine failed, 2 the input was wrong, 128 + n stopped by signal n. A
traceback is printed with `--debug` only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.text import Text

from longtail.engine.errors import InvalidInputError, LongtailError, ModelSourceError
from longtail.engine.trajectory_lines import TrajectoryFileError

FAILED, WRONG_INPUT = 1, 2
_SAME_SIGNAL_S = 1.0


class CommandError(LongtailError):
    """An error with what the command line knows about it.

    Attributes:
        exit_code: of the command.
        advice: what the user can do now; may be empty.

    """

    def __init__(self, message: str, *, exit_code: int = FAILED, advice: str = "") -> None:
        self.exit_code = exit_code
        self.advice = advice
        super().__init__(message)


class StoppedBySignal(BaseException):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises `StoppedBySignal`; a later one ends the process at once.

    Later means more than a moment: a terminal and `timeout` may send the same signal twice in a row. Outside of the
    main thread, where Python has no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first_s: float | None = None

    def stop(number: int, _frame: object) -> None:
        nonlocal first_s
        now = time.monotonic()
        if first_s is None:
            first_s = now
            raise StoppedBySignal(number)
        if now - first_s > _SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(error: Exception, flag_of: Callable[[str], str] = str) -> str:
    """The error in one line."""
    if isinstance(error, InvalidInputError):
        return f"{flag_of(error.field)}: expected {error.expected}, got {error.got}"
    message = " ".join(str(error).split())
    return message if isinstance(error, LongtailError) else f"{type(error).__name__}: {message}"


def exit_code_of(error: Exception) -> int:
    """See the module's docstring."""
    if isinstance(error, CommandError):
        return error.exit_code
    return WRONG_INPUT if isinstance(error, (InvalidInputError, ModelSourceError, TrajectoryFileError)) else FAILED


@contextlib.contextmanager
def errors_as_lines(flag_of: Callable[[str], str], *, debug: bool) -> Iterator[None]:
    """Print what goes wrong inside to standard error, and leave with its exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        yield
    except typer.Exit:
        raise
    except StoppedBySignal as stop:
        console.print(f"stopped by {stop}")
        raise typer.Exit(128 + stop.number) from None
    except Exception as error:
        if debug:
            console.print_exception()
        label = "" if exit_code_of(error) > 128 else "error: "
        console.print(Text.assemble((label, "bold red"), describe(error, flag_of)))
        if advice := getattr(error, "advice", ""):
            console.print(advice, markup=False)
        raise typer.Exit(exit_code_of(error)) from None
