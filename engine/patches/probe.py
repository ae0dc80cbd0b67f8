"""What a fresh vLLM process has of the ledger: `python -m longtail.engine.patches.probe` prints it as a line of JSON.

The process loads plugins through vLLM's own loader, as the engine core does when it starts, and then imports every
module that an entry changes, so that each change is made for real. It loads no model.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import msgspec

from longtail.engine.patches import ledger

_OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\w]*)$", re.MULTILINE)


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger in the probe's process, and how vLLM and torch see the machine.

    Attributes:
        ledger: state of each entry.
        platform: vLLM's platform, e.g. `cpu`.
        devices: names of the GPUs.
        cpu_capability: the vector instructions that torch uses, e.g. `AVX2`.
        compute_threads: torch's threads.
        openmp: the OpenMP libraries that are mapped into the process; more than one can slow each other down.
        has_triton: vLLM runs its own kernels through Triton.

    """

    ledger: ledger.ProcessState
    platform: str
    devices: tuple[str, ...]
    cpu_capability: str
    compute_threads: int
    openmp: tuple[str, ...]
    has_triton: bool


def probe() -> ProcessReport:
    """Load plugins as vLLM does, import what the ledger changes, and report.

    Raises:
        PatchLedgerError: by the plugin.

    """
    import torch
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # type: ignore[no-untyped-call]
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    for entry in ledger.ENTRIES:
        if entry.where == "everywhere" or current_platform.is_cpu():
            for change in entry.changes:
                importlib.import_module(change.module)
    return ProcessReport(
        ledger=ledger.states("fresh vLLM process"),
        platform=current_platform.device_type,
        devices=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        compute_threads=torch.get_num_threads(),
        openmp=openmp_libraries(),
        has_triton=HAS_TRITON,
    )


def openmp_libraries() -> tuple[str, ...]:
    """File names of the OpenMP libraries in this process."""
    maps = Path("/proc/self/maps")
    return tuple(sorted(set(_OPENMP.findall(maps.read_text())))) if maps.exists() else ()


if __name__ == "__main__":
    line = msgspec.json.encode(probe())
    sys.stdout.flush()
    os.write(1, b"\n" + line + b"\n")
    # Nothing here needs the libraries' slow clean-up.
    os._exit(0)
