"""How vLLM's next engine-core process is made, where stock would spawn a fresh Python.

`start_cores_with` swaps the `multiprocessing` context that vLLM takes, within a block. `ForkedCores` is the context
that forks: the core shares everything that its parent has imported, so that a start imports vLLM once. vLLM itself
forks on GPUs, and on a CPU refuses to because its OpenMP settings are given in a new process's environment, and
because GNU's OpenMP hangs in a fork of a process that has computed; `can_fork_core` is true where neither holds.

A core that is started here ends when its parent does, however that ends. Stock's would stay.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.context
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from longtail.engine.runtime import CpuRuntime

#: For a core whose parent died to end by itself, in the middle of a step at worst.
_ORPHAN_GRACE_S = 10.0
#: For a thread that draws a progress line, say, to wait again.
_PATIENCE_S = 1.0


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
def start_cores_with(context: Any) -> Iterator[None]:
    """Within the block, vLLM starts its core processes with `context` where it would spawn them. Import vLLM before."""
    import vllm.v1.engine.utils as engine_utils

    def get_mp_context() -> Any:
        usual = stock()
        return context if usual.get_start_method() == "spawn" else usual

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


class _ForkedProcess(EndsWithParent, multiprocessing.context.ForkProcess):
    def run(self) -> None:
        _let_go_of_what_is_the_parents()
        super().run()


class _SpawnedProcess(EndsWithParent, multiprocessing.context.SpawnProcess):
    pass


class ForkedCores(multiprocessing.context.ForkContext):
    """Forks as soon as every other thread waits; where one keeps working, it spawns, as stock does."""

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        deadline = time.monotonic() + _PATIENCE_S
        while not _other_threads_wait():
            if time.monotonic() > deadline:
                return _SpawnedProcess(*args, **kwargs)
            time.sleep(0.01)
        return _ForkedProcess(*args, **kwargs)


def _other_threads_wait() -> bool:
    """No other thread can hold a lock that the child would wait for: each is in `Condition.wait`, as in a future's."""
    waiting = threading.Condition.wait.__code__
    frames = sys._current_frames()
    return all(frame.f_code is waiting for thread, frame in frames.items() if thread != threading.get_ident())


def _let_go_of_what_is_the_parents() -> None:
    """What a spawned process would not have: locks on files, listening sockets, the parent's ways to hear of signals.

    A descriptor is made to point nowhere, and not closed: an object that still holds its number must not close, or
    flush what it has buffered into, whatever gets that number next.
    """
    # asyncio's: a signal to this process would be handled in the parent.
    signal.set_wakeup_fd(-1)
    # rich, pytest and notebooks replace these by objects that draw or collect.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        with suppress(OSError):
            if fd > 2 and _is_the_parents_alone(fd):
                os.dup2(nowhere, fd, inheritable=False)
    os.close(nowhere)


def _is_the_parents_alone(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as copy:
            return copy.family in (socket.AF_INET, socket.AF_INET6)
    return stat.S_ISREG(mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(1)
