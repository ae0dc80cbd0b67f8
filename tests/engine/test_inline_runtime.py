"""The run-time choice in this very process: what OpenMP library torch really calls, and what is left behind.

Each case is a process of its own, because a library cannot be unloaded. Intel's library announces itself on stderr at
its first use when `KMP_VERSION` is set, which nothing else does.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longtail.engine.cpu_machine import probe_machine

pytestmark = pytest.mark.skipif(probe_machine().intel_openmp is None, reason="intel-openmp is not installed")

BANNER = "Intel(R) OMP version"
PRELUDE = """
import os
from longtail.engine.config import RuntimeConfig
from longtail.engine.runtime import describe, pick_runtime
from longtail.engine.inline_runtime import activate_inline

runtime = pick_runtime(RuntimeConfig(omp_threads=2), model_dir=None)

def use_torch():
    import torch
    torch.randn(256, 256) @ torch.randn(256, 256)
    return torch
"""


def run(body: str, **environ: str) -> tuple[str, str]:
    """Output and errors of `body` after `PRELUDE`, in a process without the suite's own thread settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + body],
        env=inherited | {"KMP_VERSION": "1"} | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_torch_calls_intels_library_when_it_comes_later() -> None:
    body = """
with activate_inline(runtime) as active:
    torch = use_torch()
print(active.omp_library, torch.get_num_threads())
"""
    output, errors = run(body)
    assert output.split() == ["intel", "2"]
    assert BANNER in errors


def test_without_the_choice_torch_does_not_call_it() -> None:
    _, errors = run("use_torch()")
    assert BANNER not in errors


def test_after_torch_the_safe_choice_is_taken_and_said() -> None:
    body = """
use_torch()
runtime = pick_runtime(RuntimeConfig(), model_dir=None)
with activate_inline(runtime) as active:
    torch = use_torch()
print(active.omp_library, active.omp_threads == max(1, runtime.omp_threads - 1) == torch.get_num_threads())
print(describe(active))
"""
    output, errors = run(body)
    first, line = output.splitlines()
    assert first.split() == ["gnu", "True"]
    assert "torch was imported first" in line
    assert BANNER not in errors


def test_a_second_engine_in_the_process_keeps_the_library() -> None:
    body = """
for _ in range(2):
    with activate_inline(runtime) as active:
        torch = use_torch()
print(active == runtime, torch.get_num_threads())
"""
    assert run(body)[0].split() == ["True", "2"]


def test_the_environment_and_torch_are_as_before() -> None:
    body = """
before = dict(os.environ)
with activate_inline(runtime):
    torch = use_torch()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    os.environ["LD_PRELOAD"] = "/what/vllm/adds/libgomp.so"
    torch.set_num_threads = lambda n: None
torch.set_num_threads(1)
print(dict(os.environ) == before, torch.get_num_threads())
"""
    assert run(body)[0].split() == ["True", "1"]


def test_a_library_that_cannot_be_loaded_is_no_crash(tmp_path: object) -> None:
    body = f"""
from dataclasses import replace
from pathlib import Path
broken = Path({str(tmp_path)!r}, "libiomp5.so")
broken.write_bytes(b"not a library")
with activate_inline(replace(runtime, omp_path=broken)) as active:
    use_torch()
print(active.omp_library, "cannot be loaded" in active.why["omp_library"])
"""
    assert run(body)[0].split() == ["gnu", "True"]


def test_another_copy_of_the_library_is_never_loaded_beside() -> None:
    # Two copies abort the process at the first parallel region.
    body = """
import ctypes, shutil, tempfile
from pathlib import Path
with tempfile.TemporaryDirectory() as folder:
    copy = Path(shutil.copy(runtime.omp_path, folder))
    ctypes.CDLL(str(copy))
    with activate_inline(runtime) as active:
        use_torch()
print(active.omp_library, "is loaded already" in active.why["omp_library"])
"""
    assert run(body)[0].split() == ["gnu", "True"]


def test_the_allocator_of_a_running_process_stays() -> None:
    body = """
from dataclasses import replace
from pathlib import Path
with activate_inline(replace(runtime, allocator="tcmalloc", allocator_path=Path("/lib/libtcmalloc.so"))) as active:
    assert "tcmalloc" not in os.environ["LD_PRELOAD"]
print(active.allocator, "not available" in active.why["allocator"])
"""
    assert run(body)[0].split() == ["system", "True"]
