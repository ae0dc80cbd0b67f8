"""A process that is started before its work is known behaves as one that `multiprocessing` spawns."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from core_targets import answer, exit_with, fail, sleep_long, write_state

from longtail.engine.early_core import EarlyCore, _LendingContext

TIMEOUT_S = 60


@pytest.fixture
def core() -> Iterator[EarlyCore]:
    with EarlyCore.launch({"LONGTAIL_TEST_LAUNCH": "launched"}, eager=True, modules=()) as launched:
        yield launched


def start(core: EarlyCore, target: Any, *args: Any) -> Any:
    process = _LendingContext(core).Process(target=target, args=args, name="Core")
    process.start()
    return process


def test_it_runs_the_target_with_the_environment_of_launch_and_the_changes_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGTAIL_TEST_GONE", "soon")
    with EarlyCore.launch({"LONGTAIL_TEST_LAUNCH": "launched"}, eager=True, modules=()) as core:
        assert "LONGTAIL_TEST_LAUNCH" not in os.environ
        monkeypatch.setenv("LONGTAIL_TEST_LATER", "later")
        monkeypatch.delenv("LONGTAIL_TEST_GONE")
        # What vLLM puts here after the launch would be another OpenMP library.
        monkeypatch.setenv("LD_PRELOAD", "")
        process = start(core, write_state, tmp_path / "state")
    process.join(TIMEOUT_S)
    assert process.exitcode == 0
    first, *values = (tmp_path / "state").read_text(encoding="utf-8").splitlines()
    assert first == f"{core.pid} Core"
    assert values == ["launched", "later", "unset", os.environ.get("LD_PRELOAD") or "unset"]


@pytest.mark.parametrize(("target", "args", "code"), [(exit_with, (3,), 3), (exit_with, (0,), 0), (fail, (), 1)])
def test_the_exit_code_is_the_targets(core: EarlyCore, target: Any, args: tuple[int, ...], code: int) -> None:
    process = start(core, target, *args)
    assert process.pid == core.pid
    process.join(TIMEOUT_S)
    assert (process.exitcode, process.is_alive()) == (code, False)


def test_its_death_wakes_who_waits_for_it(core: EarlyCore) -> None:
    process = start(core, sleep_long)
    assert process.is_alive()
    assert wait([process.sentinel], timeout=0.2) == []
    os.kill(process.pid, signal.SIGKILL)
    assert wait([process.sentinel], timeout=TIMEOUT_S) == [process.sentinel]
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


def test_it_can_be_terminated(core: EarlyCore) -> None:
    process = start(core, sleep_long)
    process.terminate()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGTERM


def test_a_core_that_died_before_is_replaced_by_a_fresh_process(tmp_path: Path, core: EarlyCore) -> None:
    os.kill(core.pid, signal.SIGKILL)
    core._child.wait(TIMEOUT_S)
    process = start(core, write_state, tmp_path / "state")
    process.join(TIMEOUT_S)
    assert (process.exitcode, process.pid != core.pid) == (0, True)


def test_it_is_lent_once(core: EarlyCore) -> None:
    first, second = (start(core, exit_with, code) for code in (4, 5))
    for process in (first, second):
        process.join(TIMEOUT_S)
    assert (first.exitcode, second.exitcode) == (4, 5)
    assert first.pid == core.pid != second.pid


def test_a_target_that_needs_a_file_descriptor_gets_a_fresh_process(core: EarlyCore) -> None:
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = start(core, answer, sender)
    assert receiver.poll(TIMEOUT_S)
    assert receiver.recv() == process.pid != core.pid
    process.join(TIMEOUT_S)


def test_a_core_that_is_never_lent_ends_with_its_block() -> None:
    with EarlyCore.launch({}, eager=True, modules=()) as core:
        assert core.can_lend()
    assert not core.can_lend()
    with pytest.raises(ProcessLookupError):
        os.kill(core.pid, 0)


def run_script(text: str, folder: Path, *, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=timeout_s, check=False)


def test_a_core_that_is_never_lent_ends_with_its_parent(tmp_path: Path) -> None:
    done = run_script(
        """
import os, signal
from longtail.engine.early_core import EarlyCore
if __name__ == "__main__":
    print(EarlyCore.launch({}, eager=True, modules=()).pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""",
        tmp_path,
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and Path("/proc", str(pid), "cmdline").is_file():
        if "State:\tZ" in Path("/proc", str(pid), "status").read_text(encoding="ascii"):
            break
        time.sleep(0.1)
    else:
        assert not Path("/proc", str(pid)).exists()


def test_a_main_module_without_a_guard_is_told_so_and_starts_no_chain(tmp_path: Path) -> None:
    done = run_script(
        """
from longtail.engine.early_core import EarlyCore, _LendingContext
core = EarlyCore.launch({}, eager=True, modules=())
process = _LendingContext(core).Process(target=print)
process.start()
process.join()
print("exit code", process.exitcode)
core.close()
""",
        tmp_path,
    )
    assert "exit code 1" in done.stdout
    assert done.stderr.count("bootstrapping phase") == 1


def test_an_error_of_the_target_is_printed(tmp_path: Path) -> None:
    done = run_script(
        """
from longtail.engine.early_core import EarlyCore, _LendingContext
def fail():
    raise RuntimeError("the core's own error")
if __name__ == "__main__":
    with EarlyCore.launch({}, eager=True, modules=()) as core:
        process = _LendingContext(core).Process(target=fail)
        process.start()
    process.join()
    print(process.exitcode, process.pid == core.pid)
""",
        tmp_path,
    )
    assert done.stdout.split() == ["1", "True"]
    assert "the core's own error" in done.stderr
