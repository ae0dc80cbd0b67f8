"""Put a `CpuRuntime` into a process that runs already, for an engine core that lives in it or is forked from it.

Intel's OpenMP library serves torch's calls only if it is in the process before torch is: the dynamic linker binds
torch's symbols when torch is loaded, and takes them from the first library that has them. What comes too late is
replaced by what is safe, and said; nothing here raises because of it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from longtail.engine.runtime import PICKED, SET_BY_YOU, CpuRuntime, spawn_environment

_INTEL_OR_LLVM = ("libiomp", "libomp.", "libomp-")

_loaded_before_torch: set[Path] = set()


@contextmanager
def activate_inline(runtime: CpuRuntime) -> Iterator[CpuRuntime]:
    """Run the block, in which an inline core is built, with the choice; gives what came of it.

    Afterwards the environment is as before. The OpenMP library and its number of threads stay.
    """
    if not runtime.applies:
        yield runtime
        return
    if runtime.allocator_path is not None:
        why = {**runtime.why, "allocator": "tcmalloc is not available: this process runs already"}
        runtime = replace(runtime, allocator="system", allocator_path=None, why=why)
    torch = sys.modules.get("torch")
    if runtime.omp_library == "intel" and (cause := load_intel(runtime)):
        runtime = _with_gnu(runtime, cause)
    with spawn_environment(runtime):
        if torch is not None:
            torch.set_num_threads(runtime.omp_threads)
        elif runtime.omp_path is not None:
            # Its first call makes it read the environment, which is set only now.
            ctypes.CDLL(str(runtime.omp_path)).omp_get_max_threads()
        try:
            yield runtime
        finally:
            # vLLM's CPU worker replaces `torch.set_num_threads` by a function that only warns; a trainer may need it.
            if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "_C"):
                torch.set_num_threads = torch._C.set_num_threads  # type: ignore[attr-defined]


def load_intel(runtime: CpuRuntime) -> str | None:
    """Load libiomp5, unused, so that the calls of a torch that is imported later go to it; says why that can't be."""
    path = runtime.omp_path
    if path is None or path in _loaded_before_torch:
        return None
    if "torch" in sys.modules:
        return f"torch was imported first; start the engine before, or set LD_PRELOAD={path}"
    if foreign := [other for other in _loaded_intel_or_llvm() if not _is_same(other, path)]:
        # Two OpenMP libraries of this family in one process abort it.
        return f"{foreign[0].name} is loaded already"
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"it cannot be loaded ({error})"
    _loaded_before_torch.add(path)
    return None


def _with_gnu(runtime: CpuRuntime, cause: str) -> CpuRuntime:
    why = {**runtime.why, "omp_library": f"intel is not available: {cause}"}
    why.pop("block_time_ms", None)
    threads = runtime.omp_threads
    if why.get("omp_threads", PICKED) != SET_BY_YOU and threads > 1:
        threads -= 1
        why["omp_threads"] += ", one left free for gnu"
    return replace(runtime, omp_library="gnu", omp_threads=threads, block_time=None, omp_path=None, why=why)


def _loaded_intel_or_llvm() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if "omp" in line and line.count(" ") >= 5}
    return sorted(path for path in paths if path.name.startswith(_INTEL_OR_LLVM))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
