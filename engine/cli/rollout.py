"""`longtail rollout`: run one round, write its trajectories as they finish, and show what it did.

The file has every trajectory whose final output reached this process, whatever ends the run: the engine core's death,
a signal, or this process being killed. `--continue` then runs the groups that are not complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from longtail.engine.cli.engine_output import engine_output_to, last_error_in, longtail_log_on
from longtail.engine.cli.failures import CommandError, StoppedBySignal, describe, signals_raise
from longtail.engine.cli.model import make_ready
from longtail.engine.cli.progress import RoundProgress
from longtail.engine.cli.report import headline, write_report
from longtail.engine.cli.rewards import groups_table, scored, with_trajectories
from longtail.engine.cli.rollout_request import RolloutRequest
from longtail.engine.cli.round_summary import RoundSummary, counted
from longtail.engine.config import EngineConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.run_settings import save_settings, settings_path
from longtail.engine.trajectory import Round, Trajectory
from longtail.engine.trajectory_file import TrajectoryFileError, TrajectoryWriter
from longtail.engine.trajectory_lines import named_os_error

if TYPE_CHECKING:
    from longtail.engine.rollout_engine import RolloutEngine
    from longtail.engine.round_run import RoundProgress as SchedulerProgress


#: What vLLM's errors say of output that is in the log here.
_ELSEWHERE = re.compile(
    r" See (root cause above|stack trace \(above\) for the root cause)\.| Failed core proc\(s\): {}"
)


def open_engine(config: EngineConfig) -> RolloutEngine:
    """Start the engine; the first import of vLLM is here."""
    from longtail.engine.rollout_engine import RolloutEngine

    return RolloutEngine(config)


def log_path(out: Path) -> Path:
    """Where the engine's own output goes."""
    return out.with_name(out.name + ".log")


def check_files(out: Path, report: Path | None, *, overwrite: bool) -> None:
    """Make the folders and refuse what could not be written at the end of the run.

    Raises:
        InvalidInputError: names the option.

    """
    for name, path in (("out", out), ("report", report)):
        if path is None:
            continue
        if path.is_dir():
            raise InvalidInputError(name, "a file", f"the folder {path}")
        try:
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                name, f"a file in a folder that can be made ({error.strerror})", str(path)
            ) from error
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise InvalidInputError(name, "a file that can be written", str(path))
    if report is not None and report.absolute() in {
        out.absolute(),
        log_path(out.absolute()),
        settings_path(out.absolute()),
    }:
        raise InvalidInputError("report", "another file than those of the trajectories", str(report))
    if not overwrite and out.exists() and out.stat().st_size:
        raise InvalidInputError("out", "a new file (or --overwrite, or --continue FILE to go on)", str(out))


def run_rollout(
    request: RolloutRequest, report: Path | None, *, overwrite: bool = False, verbose: bool = False
) -> None:
    """Run the round that was asked for, to its end.

    Raises:
        CommandError: the run stopped before its end; says how to go on.
        LongtailError: it could not begin.

    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals_raise())
        writer = stack.enter_context(_open_writer(request, overwrite))
        save_settings(request.out, request.settings)
        try:
            round = _collect(request, writer, verbose)
        except StoppedBySignal as stop:
            raise _stopped(request, writer, f"stopped by {stop}", 128 + stop.number) from None
        except InvalidInputError:
            raise
        except Exception as error:
            raise _stopped(request, writer, _cause(error, request.out, verbose)) from error
    console = Console()
    if request.settings.task is not None:
        console.print(groups_table(round))
    console.print(Text(headline(RoundSummary.of(round)), style="bold"))
    console.print(f"trajectories: {request.out}", soft_wrap=True, highlight=False, markup=False)
    if report is not None:
        try:
            write_report(report, round, title=_title(request), settings=_shown_settings(request))
        except OSError as error:
            raise CommandError(f"the report {report} cannot be written ({error.strerror})") from error
        console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
    if round.stats.num_complete_groups < request.target_groups:
        missing = request.target_groups - round.stats.num_complete_groups
        raise CommandError(
            f"{counted(missing, 'group is', 'groups are')} missing: {round.stats.num_failed_groups} failed",
            advice=_advice(request.out),
        )


def _collect(request: RolloutRequest, writer: TrajectoryWriter, verbose: bool) -> Round:
    with contextlib.ExitStack() as stack:
        if verbose:
            console = Console()
            stack.enter_context(longtail_log_on(console))
        else:
            console = stack.enter_context(engine_output_to(log_path(request.out)))
        progress = stack.enter_context(RoundProgress(console))
        engine = stack.enter_context(_started(request, console))
        settings = request.settings
        done: list[Trajectory] = []

        def on_progress(now: SchedulerProgress) -> None:
            tokens = sum(len(trajectory.output_token_ids) for trajectory in done) + now.num_output_tokens
            progress.on_tokens(tokens, now.num_running, now.num_waiting)

        progress.start(len(request.prompts), settings.group_size, request.target_groups)
        stream = engine.stream_trajectories(
            request.prompts,
            group_size=settings.group_size,
            target_groups=request.target_groups,
            sampling=request.sampling,
            on_progress=on_progress,
        )
        for trajectory in stream:
            if settings.task is not None:
                trajectory = scored(trajectory, settings.task)
            writer.append(trajectory)
            done.append(trajectory)
            progress.on_trajectory(trajectory)
        round = with_trajectories(stream.round, done)
        progress.finish(round)
        return round


@contextlib.contextmanager
def _started(request: RolloutRequest, console: Console) -> Iterator[RolloutEngine]:
    if request.is_continued:
        missing = counted(request.target_groups, "more group")
        console.print(
            f"continuing {request.out}: {request.num_complete} complete groups, {missing} to go", soft_wrap=True
        )
    before = time.monotonic()
    console.print(f"starting the engine on {request.settings.model}", soft_wrap=True, highlight=False, markup=False)
    folder = make_ready(request.engine.model, "float32", console)
    with Live(
        Spinner("dots", "loading vLLM and the model"),
        console=console,
        transient=True,
        # vLLM's log handlers would keep the stand-ins that rich puts into `sys`.
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        engine = open_engine(dataclasses.replace(request.engine, model=str(folder)))
    with engine:
        console.print(f"engine ready after {time.monotonic() - before:.1f} s", highlight=False)
        yield engine


def _open_writer(request: RolloutRequest, overwrite: bool) -> TrajectoryWriter:
    if request.is_continued:
        return TrajectoryWriter(request.out, "continue")
    if overwrite:
        _empty(request.out)
    return TrajectoryWriter(request.out, "new")


def _empty(path: Path) -> None:
    """Drop what the file has, unless a run is writing it."""
    with named_os_error(path, "cannot be overwritten"), path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrajectoryFileError(path, "is being written by another run") from None
        file.truncate(0)


def _stopped(request: RolloutRequest, writer: TrajectoryWriter, why: str, exit_code: int = 1) -> CommandError:
    num_written = counted(len(writer.index), "trajectory", "trajectories")
    advice = f"{request.out} holds {num_written}. {_advice(request.out)}"
    return CommandError(why, exit_code=exit_code, advice=advice)


def _advice(out: Path) -> str:
    return f"To run what is missing: longtail rollout --continue {shlex.quote(str(out))}"


def _cause(error: Exception, out: Path, verbose: bool) -> str:
    words = _ELSEWHERE.sub("", describe(error))
    if verbose:
        return words
    found = last_error_in(log_path(out))
    cause = f" ({found})" if found and found not in words else ""
    return f"{words}{cause}; the engine's output is in {log_path(out)}"


def _title(request: RolloutRequest) -> str:
    settings = request.settings
    return f"longtail rollout: {settings.task or Path(settings.prompts_file or '').name}"


def _shown_settings(request: RolloutRequest) -> dict[str, str]:
    settings = request.settings
    shown: dict[str, object] = {
        "model": settings.model,
        "prompts": settings.task or settings.prompts_file,
        "group size": settings.group_size,
        "target groups": settings.target_groups,
        "over-provision": settings.over_provision,
        "complete before this round": request.num_complete if request.is_continued else None,
        **_flat("sampling", settings.sampling),
        **_flat("engine", settings.engine),
        "trajectories": request.out,
    }
    return {name: str(value) for name, value in shown.items() if value is not None}


def _flat(prefix: str, values: Mapping[str, object]) -> dict[str, object]:
    return {f"{prefix}: {name.replace('_', ' ')}": value for name, value in values.items()}
