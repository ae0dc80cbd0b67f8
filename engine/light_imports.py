"""Import vLLM in about two thirds of the time, with the same result.

Four things cost without being used at start: garbage collections over a heap that only grows, the compilation stack
behind `@torch.compile` helpers (which an eager engine would compile at its first use, seconds into the first
request), Inductor's lowerings, which vLLM imports only to add to a list in them, and SciPy's signal processing, which
only audio needs. `light_imports` turns these off, or puts them off until they are used. It leaves the process as it
found it, except that vLLM's helpers stay uncompiled where that was asked for.

It has no effect on modules that are imported already.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from longtail.engine.patches.on_import import ImportHooks

_DYNAMO_SWITCH = "TORCHDYNAMO_DISABLE"
_LOWERING = "torch._inductor.lowering"
_hooks = ImportHooks()


@contextmanager
def light_imports(*, eager: bool) -> Iterator[None]:
    """Run the block, which imports vLLM, with light imports.

    Args:
        eager: the engine runs without compilation, so vLLM's own small helpers need none either.

    """
    with ExitStack() as stack:
        stack.enter_context(_without_collections())
        stack.enter_context(_deferred_module("scipy.signal"))
        if eager:
            stack.enter_context(_uncompiled_helpers())
            _import_vllm_without_lowerings()
        yield


@contextmanager
def _without_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _uncompiled_helpers() -> Iterator[None]:
    """`torch.compile` reads this variable when it decorates, so vLLM's helpers stay what they are in Python."""
    before = os.environ.get(_DYNAMO_SWITCH)
    os.environ.setdefault(_DYNAMO_SWITCH, "1")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_DYNAMO_SWITCH, None)


class _DeferredModule(ModuleType):
    """Stands in for a module until the first use of something in it."""

    def __getattr__(self, name: str) -> Any:
        # Introspection that walks `sys.modules` asks for these, and is no use.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _deferred_module(name: str) -> Iterator[None]:
    """Have `import name` give a stand-in within the block. Who took it then keeps it; later imports are real."""
    package, _, child = name.rpartition(".")
    if name in sys.modules or importlib.util.find_spec(package) is None:
        yield
        return
    stand_in = _DeferredModule(name)
    stand_in.__file__ = None
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        if vars(sys.modules.get(package, stand_in)).get(child) is stand_in:
            delattr(sys.modules[package], child)


def _import_vllm_without_lowerings() -> None:
    """Import the package `vllm`; what it adds to a list of Inductor's is added when Inductor is used.

    vLLM skips the addition when that import fails, which is made to happen; the hook makes up for it.
    """
    if "vllm" in sys.modules or _LOWERING in sys.modules:
        return
    sys.modules[_LOWERING] = None  # type: ignore[assignment]
    try:
        import vllm.env_override
    finally:
        del sys.modules[_LOWERING]
    _hooks.add(_LOWERING, lambda _: vllm.env_override._patch_inductor_fallback_allow_list())
