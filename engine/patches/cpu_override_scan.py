"""Registering the CPU's kernel overrides neither crashes nor runs twice in one process.

Without Triton, each worker registers C++ overrides when it starts. The scan for references to the overridden kernels
asks every object in every module for its `__dict__` and takes that for a mapping; llvmlite's `ffi.lib` (which numba
imports, and with it ngram speculation) answers any attribute with a function. So a second engine in one process, or a
first one after `import numba`, dies with `'_lib_fn_wrapper' object has no attribute 'get'`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from longtail.engine.errors import PatchLedgerError
from longtail.engine.patches.entry import Change, Entry, Source


def _make_vars(stock: None, owner: Any) -> Any:
    """A `vars` for the scanning module, which shadows the built-in one there."""

    def real_vars(value: object) -> Mapping[str, Any]:
        try:
            # Past any `__getattr__`, which is where the trouble comes from.
            namespace = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return {}
        return namespace if isinstance(namespace, (dict, MappingProxyType)) else {}

    return real_vars


def _make_register_once(stock: Any, owner: type) -> Any:
    dispatcher = sys.modules.get("vllm.triton_utils.dispatcher")
    if dispatcher is not None and dispatcher._registry:
        raise PatchLedgerError(
            "an engine has started in this process before the patch ledger was applied, and runs vLLM's own CPU "
            "kernels; start longtail's engine in a new process"
        )
    registered = False

    def register_triton_kernel_overrides(cls: type) -> None:
        nonlocal registered
        if not registered:
            stock.__func__(cls)
            registered = True

    return classmethod(register_triton_kernel_overrides)


ENTRY = Entry(
    name="cpu-override-scan",
    what="The kernel overrides are registered once a process, whatever else is imported in it.",
    why="A second engine in one process, or one after `import numba`, crashes while it starts.",
    upstream=("vllm-project/vllm#45133 (the dispatcher)",),
    versions=("0.32.0",),
    where="cpu",
    changes=(
        Change("vllm.triton_utils.dispatcher", "vars", _make_vars),
        Change(
            "vllm.platforms.cpu",
            "CpuPlatform.register_triton_kernel_overrides",
            _make_register_once,
            "500c739cd6609f98",
        ),
    ),
    relies_on=(Source("vllm.triton_utils.dispatcher", "_rebind_kernels", "700f16cbc782ccd6"),),
)
