from __future__ import annotations

import sys
from types import ModuleType

import pytest

from longtail.engine.patches import ledger


@pytest.fixture
def numba_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that holds an object like llvmlite's `ffi.lib`: any attribute of it is a function."""

    class AnyAttribute:
        def __getattribute__(self, name: str) -> object:
            return lambda *args: None

    module = ModuleType("longtail_numba_like")
    module.lib = AnyAttribute()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_scan_passes_objects_whose_dict_is_no_mapping(numba_like: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.apply()
    from vllm.triton_utils import dispatcher

    holder = ModuleType("longtail_holder")
    kernel, override = object(), object()
    holder.kernel = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    dispatcher._rebind_kernels([(kernel, override)])
    assert holder.kernel is override
    monkeypatch.delattr(dispatcher, "vars")
    with pytest.raises(AttributeError, match="'get'"):
        dispatcher._rebind_kernels([(kernel, override)])


def test_overrides_are_registered_once_even_when_the_first_attempt_fails() -> None:
    from longtail.engine.patches.cpu_override_scan import _make_register_once

    calls = []

    class Platform:
        @classmethod
        def register(cls) -> None:
            calls.append(cls)
            if len(calls) == 1:
                raise RuntimeError("first")

    Platform.register = _make_register_once(vars(Platform)["register"], Platform)
    with pytest.raises(RuntimeError, match="first"):
        Platform.register()
    Platform.register()
    Platform.register()
    assert calls == [Platform, Platform]
