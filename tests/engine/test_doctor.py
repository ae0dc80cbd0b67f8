from __future__ import annotations

import importlib.metadata
import io

import msgspec
import pytest
from rich.console import Console

from longtail.engine import doctor
from longtail.engine.errors import PatchLedgerError
from longtail.engine.patches import ledger
from longtail.engine.patches.probe import ProcessReport


def run(monkeypatch: pytest.MonkeyPatch, report: ProcessReport | PatchLedgerError) -> tuple[int, str]:
    """`run_doctor` with a fresh process that answered `report`; exit status and what it printed."""

    def probe_process() -> ProcessReport:
        if isinstance(report, PatchLedgerError):
            raise report
        return report

    monkeypatch.setattr(doctor, "probe_process", probe_process)
    console = Console(file=io.StringIO(), width=200)
    status = doctor.run_doctor(console)
    return status, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def report() -> ProcessReport:
    entries = tuple(ledger.EntryState(entry.name, "applied") for entry in ledger.ENTRIES)
    return ProcessReport(
        ledger=ledger.ProcessState(process="fresh vLLM process", pid=77, entries=entries),
        platform="cpu",
        devices=(),
        cpu_capability="AVX2",
        compute_threads=2,
        openmp=("libiomp5.so",),
        has_triton=False,
    )


def test_a_real_fresh_process_has_every_entry_applied() -> None:
    report = doctor.probe_process()
    assert {entry.state for entry in report.ledger.entries} <= {"applied", "not needed"}
    assert [entry.name for entry in report.ledger.entries] == [entry.name for entry in ledger.ENTRIES]
    assert report.openmp


def test_a_fit_installation_exits_with_zero_and_shows_everything(
    monkeypatch: pytest.MonkeyPatch, report: ProcessReport
) -> None:
    status, text = run(monkeypatch, report)
    assert status == 0
    for word in ("longtail", "torch", "python", "cores", "libiomp5.so", "front end", "fresh vLLM process", "pid 77"):
        assert word in text
    for entry in ledger.ENTRIES:
        assert entry.name in text
    assert "missing in" not in text


def test_one_missing_entry_in_one_process_is_a_problem(monkeypatch: pytest.MonkeyPatch, report: ProcessReport) -> None:
    first, *others = report.ledger.entries
    broken = msgspec.structs.replace(first, state="missing", detail="stock vLLM's")
    lacking = msgspec.structs.replace(report, ledger=msgspec.structs.replace(report.ledger, entries=(broken, *others)))
    status, text = run(monkeypatch, lacking)
    assert status == 1
    assert f"{first.name} is missing in fresh vLLM process (pid 77): stock vLLM's" in " ".join(text.split())


def test_a_process_that_does_not_start_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, PatchLedgerError("a fresh vLLM process failed to start (exit status 1): reason"))
    assert status == 1
    assert "exit status 1): reason" in text


def test_an_allowlist_without_us_is_a_problem(monkeypatch: pytest.MonkeyPatch, report: ProcessReport) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    status, text = run(monkeypatch, report)
    assert status == 1
    assert "VLLM_PLUGINS='other' leaves out 'longtail'" in text


def test_an_unknown_vllm_is_a_problem_found_without_starting_anything(
    monkeypatch: pytest.MonkeyPatch, report: ProcessReport
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    status, text = run(monkeypatch, report)
    assert status == 1
    assert "found vllm 0.99.0" in text
    assert "pid 77" not in text
