"""No code of the project unpickles anything, or makes others do so."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
#: Calls of other libraries that pickle, by the last two parts of their names.
CALLS = {"torch.save", "torch.load", "pd.read_pickle"}
METHODS = {"recv_pyobj", "send_pyobj", "to_pickle", "read_pickle"}
#: Measures pickle as a baseline, on data that it has pickled itself; imports nothing of the project's wire.
ALLOWED = {"benchmarks/bridge_pickle.py"}


def violations(source: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                found.append(module)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if f"{name}.{attr}" in CALLS:
                found.append(f"{name}.{attr}")
            case ast.Attribute(attr=attr) if attr in METHODS:
                found.append(attr)
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append("allow_pickle=True")
            case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str(name))]) if name in MODULES:
                found.append(f"__import__({name!r})")
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                found += [name] if name.split(".")[0] in MODULES else []
    return found


def project_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_of_the_project_pickles() -> None:
    files = project_files()
    assert len(files) > 150
    found = {str(file.relative_to(ROOT)): violations(file.read_text()) for file in files}
    assert {name: what for name, what in found.items() if what and name not in ALLOWED} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill as d",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "socket.recv_pyobj()",
        "np.load('x', allow_pickle=True)",
        "__import__('pickle')",
        "importlib.import_module('marshal')",
    ],
)
def test_the_check_sees_it(source: str) -> None:
    assert violations(source)
