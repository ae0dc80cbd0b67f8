from __future__ import annotations

import sys
from types import ModuleType

import pytest

from longtail.engine.errors import PatchLedgerError
from longtail.engine.patches import ledger
from longtail.engine.patches.cpu_override_scan import _make_register_once


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


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    from vllm.triton_utils import dispatcher

    registry: dict[str, object] = {}
    monkeypatch.setattr(dispatcher, "_registry", registry)
    return registry


def test_overrides_are_registered_once_even_when_the_first_attempt_fails(registry: dict[str, object]) -> None:
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


def test_a_ledger_that_comes_after_an_engine_is_an_error(registry: dict[str, object]) -> None:
    registry["vllm.v1.sample.rejection_sampler.expand_kernel"] = object()
    with pytest.raises(PatchLedgerError, match="start longtail's engine in a new process"):
        _make_register_once(None, object)
