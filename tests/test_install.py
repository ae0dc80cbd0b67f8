"""Wheel, editable and strict-editable installs, each into a clean environment that holds the base dependencies alone.

Sources are built from a copy, so that nothing here writes into the checkout. Packages come from uv's cache where it
has them, and from the network otherwise.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "scheduler", "hooks", "trainer_bridge")

# Modules that a machine without vLLM and torch must be able to import.
PURE_MODULES = (
    "longtail.engine.config",
    "longtail.engine.errors",
    "longtail.engine.trajectory",
    "longtail.hooks",
    "longtail.scheduler.errors",
    "longtail.scheduler.metadata",
    "longtail.trainer_bridge",
)

PROBE = """
import importlib, importlib.metadata, importlib.resources, importlib.util, json, sys
folders, modules, targets = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
json.dump({
    "origins": {module: sys.modules[module].__file__ for module in modules},
    "leaked": [name for name in folders if importlib.util.find_spec(name)],
    "untyped": [n for n in folders if not importlib.resources.files(f"longtail.{n}").joinpath("py.typed").is_file()],
    "entry_points": [f"{e.group} {e.name} {e.value}" for e in importlib.metadata.distribution("longtail").entry_points],
    "unfound": [name for name in targets if importlib.util.find_spec(name) is None],
    "heavy": [name for name in ("torch", "vllm") if importlib.util.find_spec(name)],
}, sys.stdout)
"""


def entry_points_declared() -> list[str]:
    """`group name module:attribute` of every entry point in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = []
    for group, block in config["options.entry_points"].items():
        for line in block.strip().splitlines():
            name, value = (part.strip() for part in line.split("="))
            lines.append(f"{group} {name} {value}")
    return sorted(lines)


ENTRY_POINTS = entry_points_declared()
ENTRY_POINT_MODULES = [line.split()[-1].split(":")[0] for line in ENTRY_POINTS]


def run(*command: str | Path, cwd: Path, extra_env: dict[str, str] | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=env | (extra_env or {}), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_sources(to: Path) -> Path:
    to.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    return to


def build_wheel(sources: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=sources)
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


def source_files(sources: Path) -> set[str]:
    """Every file of the four folders, by the path that it has once installed."""
    paths = (path for folder in FOLDERS for path in (sources / folder).rglob("*") if path.is_file())
    return {f"longtail/{path.relative_to(sources).as_posix()}" for path in paths}


def wheel_files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("longtail-0.1.0.dist-info/")}


@dataclass(frozen=True)
class Installed:
    python: Path

    def probe(self, targets: Sequence[str] = (), extra_env: dict[str, str] | None = None) -> dict[str, Any]:
        """What the environment's own interpreter says about the install."""
        question = json.dumps([FOLDERS, PURE_MODULES, list(targets)])
        found = json.loads(run(self.python, "-P", "-c", PROBE, question, cwd=self.python.parent, extra_env=extra_env))
        assert isinstance(found, dict)
        return found


def install(sources: Path, venv: Path, *what: str) -> Installed:
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=sources)
    lock = str(ROOT / "requirements/cpu.lock")
    command = [find_uv_bin(), "pip", "install", "--python", str(venv / "bin/python"), "--quiet", "--no-config"]
    command += ["--constraints", lock, "--build-constraints", lock, *what]
    try:
        run(*command, "--offline", cwd=sources)
    except AssertionError:
        run(*command, cwd=sources)
    return Installed(venv / "bin/python")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy_sources(tmp_path_factory.mktemp("wheel") / "sources"))


@pytest.fixture(scope="module", params=["wheel", "editable", "strict-editable"])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "wheel":
        return install(folder, folder / "venv", str(wheel))
    sources = copy_sources(folder / "sources")
    mode = ["--config-setting", "editable_mode=strict"] if request.param == "strict-editable" else []
    return install(sources, folder / "venv", *mode, "--editable", ".")


def test_wheel_holds_exactly_the_files_of_the_four_folders(wheel: Path) -> None:
    assert wheel_files(wheel) == source_files(wheel.parents[1])


def test_a_package_that_setup_cfg_forgets_is_noticed(tmp_path: Path) -> None:
    """Negative control of the comparison above: a new package and a new kind of data file."""
    sources = copy_sources(tmp_path / "sources")
    forgotten = {"longtail/hooks/forgotten/__init__.py", "longtail/hooks/forgotten.data"}
    (sources / "hooks/forgotten").mkdir()
    for name in forgotten:
        (sources / name.removeprefix("longtail/")).touch()
    assert source_files(sources) - wheel_files(build_wheel(sources)) == forgotten


def test_clean_install_has_typed_modules_entry_points_and_no_generic_top_level_name(installed: Installed) -> None:
    found = installed.probe(ENTRY_POINT_MODULES)
    assert found["leaked"] == []
    assert found["untyped"] == []
    assert found["unfound"] == []
    assert sorted(found["entry_points"]) == ENTRY_POINTS
    assert found["heavy"] == [], "the environment is not clean: the pure modules were not put to the test"
    origins = [Path(origin) for origin in found["origins"].values()]
    assert all(not origin.is_relative_to(ROOT) for origin in origins)


def test_command_line_explains_itself_without_vllm(installed: Installed) -> None:
    assert "rollout" in run(installed.python.with_name("longtail"), "--help", cwd=installed.python.parent)


def test_a_leaked_folder_and_a_missing_entry_point_module_are_noticed(installed: Installed) -> None:
    """Negative control: with the sources on the path, `engine` is a top-level name."""
    found = installed.probe(["longtail.engine.no_such_module"], {"PYTHONPATH": str(ROOT)})
    assert found["leaked"] == list(FOLDERS)
    assert found["unfound"] == ["longtail.engine.no_such_module"]


@pytest.mark.parametrize("line", ENTRY_POINTS)
def test_entry_point_names_something_that_its_module_defines(line: str) -> None:
    module, attribute = line.split()[-1].split(":")
    path = ROOT.joinpath(*module.removeprefix("longtail.").split(".")).with_suffix(".py")
    defined = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
    assert attribute in defined


def test_mypy_sees_the_types_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """The right script passes and the wrong one fails, so it is the types that were read."""
    venv = install(tmp_path, tmp_path / "venv", str(wheel))
    header = "from longtail.scheduler.metadata import parse_metadata\n"
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", venv.python, "--config-file", os.devnull)
    (tmp_path / "right.py").write_text(header + "size: int = parse_metadata({}).group_size\n")
    run(*mypy, "right.py", cwd=tmp_path)
    (tmp_path / "wrong.py").write_text(header + "size: str = parse_metadata({}).group_size\n")
    with pytest.raises(AssertionError, match='expression has type "int"'):
        run(*mypy, "wrong.py", cwd=tmp_path)
