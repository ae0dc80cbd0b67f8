"""Run a function right after a module is imported, and not before: a process pays only for what it uses.

An error of the function ends the import with it, and a later import of the module runs the function again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]


class ImportHooks(MetaPathFinder):
    """First on `sys.meta_path`: finds modules as everyone else does, and adds a step to the import of some."""

    def __init__(self) -> None:
        self._hooks: dict[str, list[Hook]] = {}

    def add(self, module_name: str, hook: Hook) -> None:
        """Run `hook(module)` now if the module is imported already, else right after its import."""
        self._hooks.setdefault(module_name, []).append(hook)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if (module := sys.modules.get(module_name)) is not None:
            hook(module)

    def is_armed(self, module_name: str) -> bool:
        """The module's import will run its hooks."""
        return self in sys.meta_path and module_name in self._hooks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, its loader extended."""
        if fullname not in self._hooks:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(fullname, path, target)) is not None:
                self._extend(spec)
                return spec
        return None

    def _extend(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return
        exec_module = loader.exec_module

        def exec_and_run_hooks(module: ModuleType) -> None:
            exec_module(module)
            for hook in self._hooks[spec.name]:
                hook(module)

        # The loader belongs to this one spec, so that its type and everything else stay as they were.
        loader.exec_module = exec_and_run_hooks  # type: ignore[method-assign]
