"""The patch ledger: put every change to vLLM into this process, say what is in, and verify all processes of an engine.

    preflight()           before an engine starts: this vLLM is known, and its processes will load our plugin
    apply()               in every vLLM process, by the plugin
    verify_engine(call)   after an engine started: front end, engine core and workers all have every entry

A change is made when the module that it concerns is imported, so that applying the ledger imports nothing. The
ledger knows exact vLLM releases: any other, or source that reads differently, is an error, never a guess. It cannot
undo what it did.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any, Literal, NamedTuple

import msgspec

from longtail.engine.errors import PatchLedgerError
from longtail.engine.patches import (
    core_rpc,
    cpu_expand,
    cpu_override_scan,
    cpu_padded_drafts,
    cpu_seeded_prefill,
    cpu_tied_reload,
    cpu_weight_digests,
    fast_start,
    kv_parking,
    prior_output,
    request_check,
    resumed_seeds,
    trees,
    worker_report,
    worker_weights,
)
from longtail.engine.patches.entry import Change, Entry, fingerprint, module_file
from longtail.engine.patches.installation import INSTALL, SUPPORTED_VERSIONS, check_plugin, supported_release
from longtail.engine.patches.installation import PLUGIN_NAME as PLUGIN_NAME
from longtail.engine.patches.on_import import ImportHooks

#: Every change to vLLM, in the order in which they are applied and reported.
ENTRIES: tuple[Entry, ...] = (
    core_rpc.ENTRY,
    worker_report.ENTRY,
    worker_weights.ENTRY,
    request_check.ENTRY,
    cpu_override_scan.ENTRY,
    cpu_expand.ENTRY,
    cpu_padded_drafts.ENTRY,
    cpu_seeded_prefill.ENTRY,
    cpu_tied_reload.ENTRY,
    cpu_weight_digests.ENTRY,
    prior_output.ENTRY,
    resumed_seeds.ENTRY,
)

#: What changes no module or class of vLLM's for good: swapped while an engine is built and put back, or replaced in the
#: objects of one engine. Its sources are checked, it has no state.
PASSING: tuple[Entry, ...] = (fast_start.ENTRY, kv_parking.ENTRY, trees.ENTRY)

#: `armed`: the module that the entry changes is not imported in this process, and its import will make the change.
State = Literal["applied", "armed", "not needed", "missing"]


class EntryState(msgspec.Struct, frozen=True):
    """One entry in one process; `detail` says why it is missing."""

    name: str
    state: State
    detail: str = ""


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger in one process."""

    process: str
    pid: int
    entries: tuple[EntryState, ...]


class Installed(NamedTuple):
    """A change that was made: what was there before (`None` for an addition) and what is there now."""

    stock: Any
    replacement: Any


_hooks = ImportHooks()
_armed: set[str] = set()
_installed: dict[str, Installed] = {}
_lock = threading.RLock()


def check_source() -> None:
    """Check that the installed vLLM is the one that every entry was written for; imports nothing.

    Raises:
        PatchLedgerError: names the entry, the source, what was found and what to install.

    """
    distribution, version, release = supported_release()
    for entry in (*ENTRIES, *PASSING):
        if release not in entry.versions:
            raise PatchLedgerError(
                f"patch {entry.name} is written for vLLM {', '.join(entry.versions)}, found {version}: {INSTALL}"
            )
        for source in entry.sources:
            if (found := fingerprint(source.module, source.qualname)) != source.fingerprint:
                raise PatchLedgerError(
                    f"patch {entry.name}: {source.path} in {distribution} {version} is not the source that the patch "
                    f"was written for (fingerprint {found}, expected {source.fingerprint}); reinstall vLLM: {INSTALL}"
                )


def apply() -> None:
    """Put every entry into this process; safe to call again.

    Raises:
        PatchLedgerError: see `check_source`; or something else has changed the same place in this process.

    """
    with _lock:
        if len(_armed) == sum(len(entry.changes) for entry in ENTRIES):
            return
        check_source()
        for entry in ENTRIES:
            for change in entry.changes:
                if change.path not in _armed:
                    _hooks.add(change.module, _hook(entry, change))
                    _armed.add(change.path)


def states(process: str = "front end") -> ProcessState:
    """The state of every entry in this process, looked up in vLLM's live objects."""
    return ProcessState(process=process, pid=os.getpid(), entries=tuple(_state(entry) for entry in ENTRIES))


def stock(path: str) -> Any:
    """What `path` (e.g. `vllm.utils.cpu_triton_utils._expand_kernel_impl`) was before the ledger changed it."""
    return _installed[path].stock


def preflight() -> None:
    """Apply the ledger here, and check that vLLM's own processes will apply it when they start.

    Raises:
        PatchLedgerError: unknown vLLM, or vLLM would not find or not load our plugin.

    """
    check_plugin()
    apply()


def verify(processes: Iterable[ProcessState]) -> None:
    """Check that every entry is in every process.

    Raises:
        PatchLedgerError: names each process and entry that is missing.

    """
    faults: list[str] = []
    for process in processes:
        found = {entry.name: entry for entry in process.entries}
        missing = []
        for entry in ENTRIES:
            state = found.get(entry.name, EntryState(entry.name, "missing", "another version of longtail"))
            if state.state == "missing":
                missing.append(f"{entry.name} is missing in {process.process} (pid {process.pid}): {state.detail}")
        if len(missing) == len(ENTRIES):
            missing = [f"every entry is missing in {process.process} (pid {process.pid})"]
        faults += missing
    if faults:
        raise PatchLedgerError(
            f"the patch ledger is incomplete, so an engine would give wrong results: {'; '.join(faults)}. Install "
            f"longtail and vLLM {', '.join(SUPPORTED_VERSIONS)} in the one environment that all its processes use"
        )


def verify_engine(call: Callable[..., Any]) -> tuple[ProcessState, ...]:
    """Check all processes of a started engine; `call(method, *args)` calls a method of its `EngineCore`.

    Returns:
        The states of front end, engine core and workers.

    Raises:
        PatchLedgerError: names each process and entry that is missing.

    """
    try:
        answer = call("rollout_rpc", "ledger", {})
    except Exception as error:
        # The core answers a method that it does not have with an exception of no particular type.
        if "no attribute 'rollout_rpc'" not in str(error):
            raise
        answer = error
    return verify_answer(answer)


def verify_answer(answer: Mapping[str, Any] | Exception) -> tuple[ProcessState, ...]:
    """`verify_engine` for a caller that asked the engine core itself, and got this answer or exception."""
    if isinstance(answer, Exception):
        raise PatchLedgerError(
            f"the engine core runs without the patch ledger ({answer}): vLLM did not load longtail's plugin there. "
            f"Look for 'Failed to load plugin {PLUGIN_NAME}' in its log, and check VLLM_PLUGINS and the environment"
        ) from answer
    processes = (states(), *msgspec.convert(answer["processes"], tuple[ProcessState, ...]))
    if (failure := answer.get("failure")) is not None:
        raise PatchLedgerError(
            f"a worker process runs without the patch ledger ({failure}): vLLM did not load longtail's plugin there"
        )
    verify(processes)
    return processes


def _hook(entry: Entry, change: Change) -> Callable[[ModuleType], None]:
    def make_change(module: ModuleType) -> None:
        owner, attribute = _owner(module, change)
        current = vars(owner).get(attribute)
        before = _installed.get(change.path)
        if before is not None and current is before.replacement:
            return
        _check_untouched(entry, change, current)
        replacement = change.make(current, owner)
        setattr(owner, attribute, replacement)
        _installed[change.path] = Installed(current, vars(owner)[attribute])

    return make_change


def _owner(module: ModuleType, change: Change) -> tuple[Any, str]:
    owner: Any = module
    *classes, attribute = change.qualname.split(".")
    for name in classes:
        owner = getattr(owner, name)
    return owner, attribute


def _check_untouched(entry: Entry, change: Change, current: Any) -> None:
    """The live object is the one whose source was fingerprinted, not another plugin's."""
    if change.fingerprint is None:
        if current is None:
            return
    else:
        function = getattr(current, "__func__", current)
        if isinstance(function, FunctionType) and function.__code__.co_filename == str(module_file(change.module)):
            return
    raise PatchLedgerError(
        f"patch {entry.name}: something else in this process has already set {change.path} to {current!r}; "
        f"two changes of one place cannot both hold"
    )


def _state(entry: Entry) -> EntryState:
    applied = 0
    for change in entry.changes:
        module = sys.modules.get(change.module)
        if module is None:
            if not _hooks.is_armed(change.module):
                return EntryState(entry.name, "missing", "the ledger was not applied in this process")
            continue
        owner, attribute = _owner(module, change)
        installed = _installed.get(change.path)
        if installed is None:
            return EntryState(entry.name, "missing", f"{change.path} is stock vLLM's")
        if vars(owner).get(attribute) is not installed.replacement:
            return EntryState(entry.name, "missing", f"{change.path} was changed again after the ledger")
        applied += 1
    if applied == len(entry.changes):
        return EntryState(entry.name, "applied")
    if entry.where == "cpu" and not _runs_on_cpu():
        return EntryState(entry.name, "not needed", "not a CPU platform")
    return EntryState(entry.name, "armed")


def _runs_on_cpu() -> bool:
    """Whether vLLM has chosen its CPU platform; true while it has chosen none."""
    platforms = sys.modules.get("vllm.platforms")
    chosen = getattr(platforms, "_current_platform", None)
    return chosen is None or bool(chosen.is_cpu())
