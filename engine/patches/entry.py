"""What one change to vLLM declares, and the fingerprint of the source that it was written against.

A fingerprint is taken from the text of vLLM's file, so that it is checked before anything is imported: in every
process, in milliseconds. It covers Python source only; compiled kernels are covered by the version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from longtail.engine.errors import PatchLedgerError

_FINGERPRINT_CHARS = 16


@dataclass(frozen=True)
class Source:
    """A function of vLLM that must read as it did when the entry was written.

    Attributes:
        module: e.g. `vllm.v1.engine.core`.
        qualname: e.g. `EngineCore.add_request`.
        fingerprint: see `fingerprint`.

    """

    module: str
    qualname: str
    fingerprint: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(frozen=True)
class Change:
    """One attribute of a vLLM module or class that an entry replaces or adds.

    Attributes:
        module: the module whose import triggers the change.
        qualname: attribute of the module, or `Class.attribute`.
        make: `(stock, owner) -> replacement`; `stock` is `None` for an attribute that is added. Runs once a process,
            right after `module` is imported, and imports there what the replacement needs.
        fingerprint: of the source that is replaced; `None` says that the owner itself must not have the attribute.

    """

    module: str
    qualname: str
    make: Callable[[Any, Any], Any]
    fingerprint: str | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One change to vLLM: what, why, where from and against which source.

    Attributes:
        name: unique, used in states and errors.
        what: what vLLM does with the entry in, in one sentence.
        why: what is wrong or missing without it.
        upstream: issues and pull requests of vLLM; empty if none is known.
        versions: the vLLM releases that it was written for.
        where: `everywhere`, or `cpu` for code that only the CPU platform runs.
        changes: what is replaced or added.
        relies_on: source that is not changed but that the change depends on.

    """

    name: str
    what: str
    why: str
    upstream: tuple[str, ...]
    versions: tuple[str, ...]
    where: Literal["everywhere", "cpu"]
    changes: tuple[Change, ...]
    relies_on: tuple[Source, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source with a fingerprint: what is replaced and what is relied on."""
        replaced = (Source(c.module, c.qualname, c.fingerprint) for c in self.changes if c.fingerprint is not None)
        return (*replaced, *self.relies_on)


def fingerprint(module: str, qualname: str) -> str:
    """Hash of a function's source in the installed vLLM; blank lines and trailing blanks do not count.

    Raises:
        PatchLedgerError: there is no such function.

    """
    lines = _source_lines(module_file(module))
    text = "\n".join(_block(lines, module, qualname))
    return hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_CHARS]


def module_file(module: str) -> Path:
    """The file of a vLLM module, found without importing it.

    Raises:
        PatchLedgerError: vLLM or the module is not there.

    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise PatchLedgerError("vLLM is not installed")
    base = Path(spec.submodule_search_locations[0], *module.split(".")[1:])
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    raise PatchLedgerError(f"the installed vLLM has no module {module}")


@lru_cache(maxsize=32)
def _source_lines(file: Path) -> list[str]:
    return [line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()]


def _block(lines: list[str], module: str, qualname: str) -> list[str]:
    """The lines of a function, decorators included, without its indentation and blank lines."""
    start, indent = -1, 0
    for depth, name in enumerate(qualname.split(".")):
        indent = 4 * depth
        head = re.compile(rf" {{{indent}}}(?:async def|def|class) {re.escape(name)}\b")
        start = next((i for i in range(start + 1, len(lines)) if head.match(lines[i])), -1)
        if start < 0:
            raise PatchLedgerError(f"the installed vLLM has no {module}.{qualname}")
    end = start + 1
    # A line no deeper than the head ends the body, except the closing bracket of a long signature or return type.
    while end < len(lines) and (not lines[end] or lines[end][indent:][:1] in (" ", ")", "]")):
        end += 1
    while lines[start - 1].startswith(" " * indent + "@"):
        start -= 1
    return [line[indent:] for line in lines[start:end] if line]
