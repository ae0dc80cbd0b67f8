"""How vLLM's next engine-core process is made, where stock would spawn a fresh Python.

`start_cores_with` swaps the `multiprocessing` context that vLLM takes, within a block. `ForkedCores` is the context
that forks: the core shares everything that its parent has imported, so that a start imports vLLM once. vLLM itself
forks on GPUs, and on a CPU refuses to because its OpenMP settings are given in a new process's environment, and
because GNU's OpenMP hangs in a fork of a process that has computed; `can_fork_core` is true where neither holds.

A core that is started here ends when its parent does, however that ends. Stock's would stay.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

from longtail.engine.runtime import CpuRuntime

#: For a core whose parent died to end by itself, in the middle of a step at worst.
_ORPHAN_GRACE_S = 10.0
#: For a thread that draws a progress line, say, to wait again.
_PATIENCE_S = 1.0


class _File(NamedTuple):
    """An open file by its descriptor, device and inode."""

    fd: int
    device: int
    inode: int


def can_fork_core(runtime: CpuRuntime) -> bool:
    """Nothing can be in a state here that a fork would break, and the run-time needs no new process.

    True in a fresh process that starts an engine first: torch is not imported, so there are no compute threads, and
    whatever other threads Python has only wait for something. Intel's OpenMP library bears a fork, used or not.
    """
    return (
        runtime.omp_library == "intel"
        and runtime.allocator_path is None
        and "torch" not in sys.modules
        and _other_threads_wait()
    )


@contextmanager
def start_cores_with(contexts: Mapping[str, multiprocessing.context.BaseContext]) -> Iterator[None]:
    """Within the block, vLLM starts a core with what `contexts` has for the start method that it would use.

    Import vLLM before.
    """
    import vllm.v1.engine.utils as engine_utils

    def get_mp_context() -> Any:
        usual = stock()
        return contexts.get(usual.get_start_method(), usual)

    names: Any = vars(engine_utils)
    stock = names["get_mp_context"]
    names["get_mp_context"] = get_mp_context
    try:
        yield
    finally:
        names["get_mp_context"] = stock


class EndsWithParent(multiprocessing.process.BaseProcess):
    """A process of `multiprocessing` that does not outlive its parent."""

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, name="longtail-parent-watch", daemon=True).start()
        super().run()


class _SpawnedProcess(EndsWithParent, multiprocessing.context.SpawnProcess):
    pass


class _StockForkedProcess(EndsWithParent, multiprocessing.context.ForkProcess):
    pass


class _SpawnedCores(multiprocessing.context.SpawnContext):
    Process = _SpawnedProcess


class _StockForkedCores(multiprocessing.context.ForkContext):
    Process = _StockForkedProcess


#: vLLM's own ways, for cores that end with their parent.
STOCK_METHODS: Final[Mapping[str, multiprocessing.context.BaseContext]] = {
    "fork": _StockForkedCores(),
    "spawn": _SpawnedCores(),
}


class _ForkedProcess(_StockForkedProcess):
    parents_files: frozenset[_File] = frozenset()

    def run(self) -> None:
        _let_go_of(self.parents_files)
        super().run()


class ForkedCores(multiprocessing.context.ForkContext):
    """Forks as soon as every other thread waits; where one keeps working, it spawns, as stock does.

    Make it before vLLM is imported: what is open by then is the user's, and not a core's.
    """

    def __init__(self) -> None:
        self._parents_files = frozenset(_open_files())

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        deadline = time.monotonic() + _PATIENCE_S
        while not _other_threads_wait():
            if time.monotonic() > deadline:
                return _SpawnedProcess(*args, **kwargs)
            time.sleep(0.01)
        process = _ForkedProcess(*args, **kwargs)
        process.parents_files = self._parents_files
        return process


def _other_threads_wait() -> bool:
    """No other thread can hold a lock that the child would wait for: each is in `Condition.wait`, as in a future's."""
    waiting = threading.Condition.wait.__code__
    frames = sys._current_frames()
    return all(frame.f_code is waiting for thread, frame in frames.items() if thread != threading.get_ident())


def _open_files() -> Iterator[_File]:
    """Open descriptors but for the standard ones, and for that of the one helper that processes share."""
    tracker = getattr(multiprocessing.resource_tracker._resource_tracker, "_fd", None)
    for name in os.listdir("/proc/self/fd"):
        if (fd := int(name)) > 2 and fd != tracker:
            with suppress(OSError):
                yield _identify(fd)


def _identify(fd: int) -> _File:
    status = os.fstat(fd)
    return _File(fd, status.st_dev, status.st_ino)


def _let_go_of(files: Iterable[_File]) -> None:
    """Have nothing that a spawned process would not have: locks, listening sockets, the writing ends of pipes.

    A descriptor is made to point nowhere, and not closed: an object that still holds its number must not close, or
    flush what it has buffered into, whatever gets that number next.
    """
    # asyncio's: a signal to this process would be handled in the parent.
    signal.set_wakeup_fd(-1)
    # rich, pytest and notebooks replace these by objects that draw or collect.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for file in files:
        with suppress(OSError):
            if _identify(file.fd) == file:
                os.dup2(nowhere, file.fd, inheritable=False)
    os.close(nowhere)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(1)
