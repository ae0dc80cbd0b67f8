"""Which OpenMP library, threads, blocking time and allocator a CPU engine runs with.

The libraries' defaults are far off for a decode step, which is many short parallel regions: two of torch's GNU
threads, or threads that spin between regions while another process wants their core, cost up to 8 x. `pick_runtime`
decides, from a `Machine` and without side effects; `spawn_environment` puts the choice around the start of a core
process, and `inline_runtime.activate_inline` into this one. A field of `RuntimeConfig` wins over an environment
variable that the user set, and that over the pick. On a GPU, or off Linux, all of it does nothing.

It is for one engine without tensor parallelism. It binds no threads and no memory: on a machine with several NUMA
nodes start the process under `numactl`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

from longtail.engine.config import RuntimeConfig
from longtail.engine.cpu_machine import Machine, probe_machine
from longtail.engine.errors import InvalidInputError

OmpLibrary = Literal["intel", "gnu"]

PICKED: Final = "picked"
SET_BY_YOU: Final = "set by you"

#: Below this many parameters a parallel region costs more than it saves.
TINY_MODEL_PARAMETERS: Final = 20_000_000

_BLOCK_TIME_MS = "1"
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_PRELOADED_OMP: Mapping[str, OmpLibrary] = {"libiomp": "intel", "libomp.": "intel", "libgomp": "gnu"}
_PRELOADED_MALLOC = ("tcmalloc", "jemalloc", "mimalloc")


@dataclass(frozen=True, kw_only=True)
class CpuRuntime:
    """One choice, ready to be put into a process.

    Attributes:
        applies: false on a GPU or off Linux: nothing is set, and the other fields mean nothing.
        omp_library: `intel` or `gnu`.
        omp_threads: compute threads of the engine.
        block_time: `KMP_BLOCKTIME`; `None` for GNU, which has no such setting.
        allocator: `tcmalloc`, `system`, or what the user preloads.
        omp_path: the OpenMP library to load; `None` for GNU and for what the user preloads.
        allocator_path: the allocator to load; `None` for the system's and for what the user preloads.
        kept: variables of the user's that say how to run, unchanged.
        why: for each field of `RuntimeConfig`: `picked`, `set by you`, or what stood in the way.

    """

    applies: bool
    omp_library: OmpLibrary = "gnu"
    omp_threads: int = 1
    block_time: str | None = None
    allocator: str = "system"
    omp_path: Path | None = None
    allocator_path: Path | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The variables that a process needs from its very start."""
        if not self.applies:
            return {}
        variables = {"OMP_NUM_THREADS": str(self.omp_threads), _BINDING: self.kept.get(_BINDING, "nobind")}
        if self.block_time is not None:
            variables["KMP_BLOCKTIME"] = self.block_time
        ours = [str(path) for path in (self.allocator_path, self.omp_path) if path is not None]
        if libraries := [*ours, *filter(None, [self.kept.get("LD_PRELOAD")])]:
            variables["LD_PRELOAD"] = ":".join(libraries)
        return variables


class _Pick(NamedTuple):
    value: str
    why: str
    path: Path | None = None


def pick_runtime(
    config: RuntimeConfig,
    *,
    model_dir: Path | None,
    environ: Mapping[str, str] | None = None,
    machine: Machine | None = None,
) -> CpuRuntime:
    """Choose for this machine and model; changes nothing.

    Args:
        config: what the user fixed.
        model_dir: the checkpoint, to see how large the model is; `None` takes it for a large one.
        environ: the user's environment; this process's by default.
        machine: where the engine will run; this machine by default.

    Raises:
        InvalidInputError: a library is asked for that is not there, or a variable does not hold a number.

    """
    environ = os.environ if environ is None else environ
    machine = probe_machine(environ) if machine is None else machine
    if not machine.runs_on_cpu:
        return CpuRuntime(applies=False)
    kept = {name: environ[name] for name in ("LD_PRELOAD", _BINDING) if environ.get(name)}
    preloaded = kept.get("LD_PRELOAD", "")
    library = _pick_library(config, preloaded, machine)
    uses_intel = library.value == "intel"
    threads = _pick_threads(config, environ, machine, uses_intel, model_dir)
    block_time = _pick_block_time(config, environ) if uses_intel else None
    allocator = _pick_allocator(config, preloaded, machine)
    picks = {"omp_library": library, "omp_threads": threads, "block_time_ms": block_time, "allocator": allocator}
    return CpuRuntime(
        applies=True,
        omp_library="intel" if uses_intel else "gnu",
        omp_threads=int(threads.value),
        block_time=None if block_time is None else block_time.value,
        allocator=allocator.value,
        omp_path=library.path,
        allocator_path=allocator.path,
        kept=kept,
        why={name: pick.why for name, pick in picks.items() if pick is not None},
    )


def describe(runtime: CpuRuntime) -> str:
    """One line to print: what runs, and who decided."""
    if not runtime.applies:
        return "CPU run-time: left alone, this vLLM does not run on a CPU"
    shown = {
        "omp_library": f"OpenMP {runtime.omp_library}",
        "omp_threads": f"{runtime.omp_threads} thread{'s' if runtime.omp_threads > 1 else ''}",
        "allocator": f"allocator {runtime.allocator}",
    }
    if runtime.block_time is not None:
        unit = " ms" if runtime.block_time.isdecimal() else ""
        shown["block_time_ms"] = f"blocking time {runtime.block_time}{unit}"
    return "CPU run-time: " + ", ".join(f"{text} ({runtime.why.get(name, PICKED)})" for name, text in shown.items())


@contextmanager
def spawn_environment(runtime: CpuRuntime) -> Iterator[None]:
    """Have `os.environ` as a core process needs it; as it was again afterwards.

    Goes around building vLLM's configuration too: vLLM's CPU platform adds torch's libgomp to `LD_PRELOAD` unless
    an OpenMP library is there, and that would reach every later child of this process.
    """
    variables = runtime.environment()
    touched = {*variables, "LD_PRELOAD"} if runtime.applies else set()
    saved = {name: os.environ.get(name) for name in touched}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def estimate_parameters(model_dir: Path) -> int | None:
    """Parameters of a decoder, roughly, from `config.json` alone; `None` if that does not say."""
    try:
        config = json.loads((model_dir / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    if not isinstance(config, dict):
        return None

    def size(name: str) -> int | None:
        value = config.get(name)
        return value if isinstance(value, int) and value > 0 else None

    hidden, layers, vocabulary = size("hidden_size"), size("num_hidden_layers"), size("vocab_size")
    if hidden is None or layers is None or vocabulary is None:
        return None
    inner = (size("intermediate_size") or 4 * hidden) * (size("num_experts") or size("num_local_experts") or 1)
    return layers * hidden * (4 * hidden + 3 * inner) + vocabulary * hidden


def _pick_library(config: RuntimeConfig, preloaded: str, machine: Machine) -> _Pick:
    wanted = config.omp_library
    if user := next((library for name, library in _PRELOADED_OMP.items() if name in preloaded), None):
        if wanted not in (None, user):
            raise InvalidInputError("runtime.omp_library", f"`{user}`, which LD_PRELOAD loads", wanted)
        return _Pick(user, SET_BY_YOU)
    if wanted == "intel" and machine.intel_openmp is None:
        raise InvalidInputError("runtime.omp_library", "`gnu`, or the package `intel-openmp` installed", wanted)
    if wanted == "gnu":
        return _Pick("gnu", SET_BY_YOU)
    if machine.intel_openmp is None:
        return _Pick("gnu", "intel is not available")
    return _Pick("intel", PICKED if wanted is None else SET_BY_YOU, machine.intel_openmp)


def _pick_threads(
    config: RuntimeConfig, environ: Mapping[str, str], machine: Machine, uses_intel: bool, model_dir: Path | None
) -> _Pick:
    if config.omp_threads is not None:
        return _Pick(str(config.omp_threads), SET_BY_YOU)
    if user := environ.get("OMP_NUM_THREADS", "").strip():
        # A list has one number for each level of nesting; the engine has one level.
        first = user.split(",")[0].strip()
        if not first.isdecimal() or int(first) < 1:
            raise InvalidInputError("OMP_NUM_THREADS", "an integer >= 1", user)
        return _Pick(str(int(first)), SET_BY_YOU)
    parameters = None if model_dir is None else estimate_parameters(model_dir)
    if parameters is not None and parameters < TINY_MODEL_PARAMETERS:
        return _Pick("1", f"{PICKED}: tiny model")
    why = f"{PICKED}: {machine.num_cores} core{'s' if machine.num_cores > 1 else ''}"
    if machine.num_nodes > 1:
        why += f" on one of {machine.num_nodes} NUMA nodes"
    if uses_intel or machine.num_cores == 1:
        return _Pick(str(machine.num_cores), why)
    # GNU threads lose more to a scheduler or front end on their core than one thread less costs.
    return _Pick(str(machine.num_cores - 1), f"{why}, one left free for gnu")


def _pick_block_time(config: RuntimeConfig, environ: Mapping[str, str]) -> _Pick:
    if config.block_time_ms is not None:
        return _Pick(str(config.block_time_ms), SET_BY_YOU)
    if user := environ.get("KMP_BLOCKTIME", "").strip():
        return _Pick(user, SET_BY_YOU)
    return _Pick(_BLOCK_TIME_MS, PICKED)


def _pick_allocator(config: RuntimeConfig, preloaded: str, machine: Machine) -> _Pick:
    wanted = config.allocator
    if user := next((name for name in _PRELOADED_MALLOC if name in preloaded), None):
        if wanted not in (None, user):
            raise InvalidInputError("runtime.allocator", f"unset, because LD_PRELOAD loads {user}", wanted)
        return _Pick(user, SET_BY_YOU)
    if wanted == "tcmalloc" and machine.tcmalloc is None:
        raise InvalidInputError("runtime.allocator", "`system`, or libtcmalloc installed on this system", wanted)
    if wanted == "system":
        return _Pick("system", SET_BY_YOU)
    if machine.tcmalloc is None:
        return _Pick("system", "tcmalloc is not available")
    return _Pick("tcmalloc", PICKED if wanted is None else SET_BY_YOU, machine.tcmalloc)
