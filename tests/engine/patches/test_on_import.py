from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from longtail.engine.patches.on_import import ImportHooks

NAME = "longtail_hook_target"


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImportHooks]:
    (tmp_path / f"{NAME}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    hooks = ImportHooks()
    yield hooks
    if hooks in sys.meta_path:
        sys.meta_path.remove(hooks)
    sys.modules.pop(NAME, None)


def double(module: ModuleType) -> None:
    module.value *= 2


def test_a_hook_runs_once_after_the_import_and_not_before(hooks: ImportHooks) -> None:
    hooks.add(NAME, double)
    assert NAME not in sys.modules
    assert hooks.is_armed(NAME)
    assert importlib.import_module(NAME).value == 2
    assert importlib.import_module(NAME).value == 2


def test_a_module_that_is_imported_already_is_changed_at_once(hooks: ImportHooks) -> None:
    module = importlib.import_module(NAME)
    assert module.value == 1
    hooks.add(NAME, double)
    assert module.value == 2


def test_the_module_keeps_its_loader_and_source(hooks: ImportHooks) -> None:
    hooks.add(NAME, double)
    module = importlib.import_module(NAME)
    assert type(module.__loader__) is SourceFileLoader
    assert module.__loader__.get_source(NAME) == "value = 1\n"


def test_an_error_in_a_hook_ends_every_import(hooks: ImportHooks) -> None:
    def fail(module: ModuleType) -> None:
        raise RuntimeError("no")

    hooks.add(NAME, fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            importlib.import_module(NAME)
        assert NAME not in sys.modules


def test_hooks_off_the_path_are_not_armed(hooks: ImportHooks) -> None:
    hooks.add(NAME, double)
    sys.meta_path.remove(hooks)
    assert not hooks.is_armed(NAME)
    assert importlib.import_module(NAME).value == 1
