"""Light imports give the same vLLM, sooner, and leave the process as it was. Each case is a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(300)

LOWERING = "torch._inductor.lowering"


def run(body: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_put_off_is_not_imported_and_works_when_it_is_used() -> None:
    body = f"""
import gc, os, sys
from longtail.engine.light_imports import light_imports
with light_imports(eager=True):
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker
    print(gc.isenabled())
print(gc.isenabled(), "TORCHDYNAMO_DISABLE" in os.environ)
print([name for name in ({LOWERING!r}, "scipy.signal", "scipy.stats") if name in sys.modules])

import vllm.multimodal.audio as audio
import numpy as np
print(np.round(audio.scipy_signal.resample_poly(np.arange(8.0), 1, 2), 3).tolist())
import scipy.signal
print(scipy.signal.resample_poly is audio.scipy_signal.resample_poly, type(scipy.signal).__name__)

import torch
from vllm.v1.sample.ops.logprobs import batched_count_greater_than as count
print(hasattr(count, "_torchdynamo_orig_callable"), count(torch.tensor([[1., 3., 2.]]), torch.tensor([[2.]])).tolist())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())

from torch._inductor.lowering import FALLBACK_ALLOW_LIST
import torch._inductor.graph
print("vllm::anything" in FALLBACK_ALLOW_LIST, torch._inductor.graph.FALLBACK_ALLOW_LIST is FALLBACK_ALLOW_LIST)
"""
    collecting, after, put_off, resampled, same, helper, compiled, patched = run(body)
    assert collecting == "False"
    assert after == "True False"
    assert put_off == "[]"
    assert (
        resampled
        == run(
            "import numpy as np, scipy.signal as s; print(np.round(s.resample_poly(np.arange(8.0), 1, 2), 3).tolist())"
        )[0]
    )
    assert same == "True module"
    assert helper == "False [2]"
    assert compiled == "2.0"
    assert patched == "True True"


def test_stock_imports_do_have_all_of_it() -> None:
    body = f"""
import sys
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker
from vllm.v1.sample.ops.logprobs import batched_count_greater_than as count
from torch._inductor.lowering import FALLBACK_ALLOW_LIST
print([name in sys.modules for name in ({LOWERING!r}, "scipy.signal")], hasattr(count, "_torchdynamo_orig_callable"))
print("vllm::anything" in FALLBACK_ALLOW_LIST)
"""
    assert run(body) == ["[True, True] True", "True"]


def test_with_compilation_vllms_helpers_are_compiled() -> None:
    body = """
from longtail.engine.light_imports import light_imports
with light_imports(eager=False):
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than as count
print(hasattr(count, "_torchdynamo_orig_callable"))
"""
    assert run(body) == ["True"]


def test_modules_that_are_there_already_stay() -> None:
    body = """
import scipy.signal, sys
from longtail.engine.light_imports import _deferred_module
before = sys.modules["scipy.signal"]
with _deferred_module("scipy.signal"):
    import scipy.signal as inside
print(inside is before is sys.modules["scipy.signal"])
with _deferred_module("no_such_package.child"):
    pass
"""
    assert run(body) == ["True"]
