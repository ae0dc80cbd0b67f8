"""Start the engine-core process before there is anything to tell it.

A spawned core imports vLLM for as long as its parent does, and stock vLLM starts it only when the parent is done.
`EarlyCore.launch` starts the interpreter at once, with an environment of its own; it imports what a core needs while
the parent imports what a front end needs. `lend` then has vLLM's next core process be this one: the process object is
sent to it as `multiprocessing` would send it to a fresh one, and everything after that is stock.

A core that is not there any more, or a process object that needs file descriptors, gets a fresh process as before.
What is never lent ends with `close()`, or when the parent does. Linux only.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing.context
import multiprocessing.popen_spawn_posix
import multiprocessing.reduction
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import util
from types import TracebackType
from typing import Any, Final, Self

from longtail.engine.core_process import EndsWithParent, start_cores_with

#: What a core imports before it knows its model; each pulls in many more.
CORE_MODULES: Final = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader.default_loader",
)
_LENGTH = struct.Struct("!Q")
_BOOT = (
    "import json, sys; orders = json.loads(sys.argv.pop()); sys.path[:] = orders['path']; "
    "from longtail.engine.early_core import run_early_core; run_early_core(**orders['run'])"
)
#: Room for the process object, so that sending it does not wait for the other side.
_PIPE_BYTES: Final = 1 << 20


class EarlyCore:
    """A process that waits to become an engine core."""

    def __init__(self, child: subprocess.Popen[bytes], to_child: int, from_child: int, fixed: frozenset[str]) -> None:
        self._child = child
        self._to_child = to_child
        self._from_child = from_child
        self._fixed = fixed
        self._environ = dict(os.environ)
        self._executable = multiprocessing.spawn.get_executable()
        self._lent = False

    @classmethod
    def launch(cls, variables: Mapping[str, str], *, eager: bool, modules: Sequence[str] = CORE_MODULES) -> EarlyCore:
        """Start the process; returns at once.

        Args:
            variables: added to its environment, and not to this process's.
            eager: see `light_imports`.
            modules: what it imports while it waits.

        """
        # Raises, as any spawn would, in a main module that starts processes when it is imported.
        multiprocessing.spawn.get_preparation_data("")
        tracker = multiprocessing.resource_tracker.getfd()
        assert tracker is not None
        child_reads, to_child = os.pipe()
        from_child, child_holds = os.pipe()
        with suppress(OSError):
            fcntl.fcntl(to_child, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        inherited = (tracker, child_reads, child_holds)
        interpreter = [os.fsdecode(part) for part in multiprocessing.spawn.get_command_line()[:-2]]
        run = {"tracker": tracker, "reads": child_reads, "modules": list(modules), "eager": eager}
        orders = json.dumps({"path": sys.path, "run": run})
        try:
            child = subprocess.Popen(
                [*interpreter, _BOOT, "--multiprocessing-fork", orders],
                env=os.environ | dict(variables),
                pass_fds=inherited,
            )
        except OSError:
            _close(to_child, from_child)
            raise
        finally:
            _close(child_reads, child_holds)
        return cls(child, to_child, from_child, frozenset({*variables, "LD_PRELOAD"}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id, the same before and after it was lent."""
        return self._child.pid

    def can_lend(self) -> bool:
        """It is alive, nobody has it, and vLLM has not asked for another interpreter (as for NUMA binding)."""
        same_interpreter = multiprocessing.spawn.get_executable() == self._executable
        return not self._lent and same_interpreter and self._child.poll() is None

    def lend(self) -> AbstractContextManager[None]:
        """Within the block, vLLM's next core process is this one. Import vLLM before."""
        return start_cores_with({"spawn": _LendingContext(self)})

    def close(self) -> None:
        """End it, unless it was lent; then it is vLLM's."""
        if self._lent:
            return
        self._lent = True
        _close(self._to_child, self._from_child)
        self._child.kill()
        self._child.wait()

    def _environ_changes(self) -> bytes:
        """What this process has changed in its environment since, except what the core was launched with."""
        names = (self._environ.keys() | os.environ.keys()) - self._fixed
        changes = {name: os.environ.get(name) for name in names if os.environ.get(name) != self._environ.get(name)}
        return json.dumps(changes).encode()


class _NeedsFreshProcessError(Exception):
    """The process object holds a file descriptor, which only a process that is started now can inherit."""


class _LentPopen(multiprocessing.popen_spawn_posix.Popen):
    """`multiprocessing`'s handle of a spawned process, for one that runs already."""

    def __init__(self, process: multiprocessing.process.BaseProcess, core: EarlyCore) -> None:
        self._core = core
        super().__init__(process)

    def duplicate_for_child(self, fd: int) -> int:
        raise _NeedsFreshProcessError

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            self.returncode = self._core._child.poll() if flag == os.WNOHANG else self._core._child.wait()
        return self.returncode

    def _launch(self, process: multiprocessing.process.BaseProcess) -> None:
        core = self._core
        body = io.BytesIO()
        multiprocessing.context.set_spawning_popen(self)
        try:
            multiprocessing.reduction.dump(multiprocessing.spawn.get_preparation_data(process.name), body)
            multiprocessing.reduction.dump(process, body)
        finally:
            multiprocessing.context.set_spawning_popen(None)
        changes = core._environ_changes()
        with open(core._to_child, "wb", closefd=False) as pipe:
            pipe.write(_LENGTH.pack(len(changes)) + changes)
            pipe.write(body.getbuffer())
        core._lent = True
        self.pid = core.pid
        self.sentinel = core._from_child
        # The child takes the end of this pipe for the death of its parent.
        self.finalizer = util.Finalize(self, _close, (core._to_child, core._from_child))


class _LentProcess(EndsWithParent, multiprocessing.context.SpawnProcess):
    """A spawned process that runs in an `EarlyCore` if it can."""

    early_core: EarlyCore | None = None

    @staticmethod
    def _Popen(process: Any) -> Any:
        core = process.__dict__.pop("early_core", None)
        if core is not None and core.can_lend():
            with suppress(_NeedsFreshProcessError, BrokenPipeError):
                return _LentPopen(process, core)
        return multiprocessing.context.SpawnProcess._Popen(process)


class _LendingContext(multiprocessing.context.SpawnContext):
    def __init__(self, core: EarlyCore) -> None:
        self._core = core

    def Process(self, *args: Any, **kwargs: Any) -> _LentProcess:  # type: ignore[override]
        process = _LentProcess(*args, **kwargs)
        process.early_core = self._core
        return process


def run_early_core(tracker: int, reads: int, modules: Sequence[str], eager: bool) -> None:
    """Body of the process: import, wait for the process object, be it."""
    # Ctrl-C goes to the whole group; the parent handles it, and this process ends with the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if modules:
        _import_while_waiting(modules, eager=eager)
    header = _read_exactly(reads, _LENGTH.size)
    for name, value in json.loads(_read_exactly(reads, *_LENGTH.unpack(header))).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 1
    try:
        multiprocessing.spawn.spawn_main(tracker_fd=tracker, pipe_handle=reads)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        # As a forked process ends. The end of an interpreter with vLLM in it takes seconds, and vLLM kills after five.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _import_while_waiting(modules: Sequence[str], *, eager: bool) -> None:
    import gc
    import importlib

    from longtail.engine.light_imports import light_imports
    from longtail.engine.patches import ledger

    with light_imports(eager=eager):
        # What fails here will fail again, in vLLM, with an error that reaches the parent.
        with suppress(Exception):
            # Before the modules that it changes, so that none has taken a stock function from another.
            ledger.apply()
        for name in modules:
            with suppress(Exception):
                importlib.import_module(name)
        # vLLM collects and freezes at the end of the start; there is next to no garbage among modules.
        gc.freeze()


def _read_exactly(fd: int, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        if not (part := os.read(fd, num_bytes - len(data))):
            os._exit(0)
        data += part
    return data


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
