"""What benchmarks share: their two flags, worker processes, the machine's description, and the last line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

_RUNTIME_VARIABLES = ("OMP_", "KMP_", "GOMP_", "LD_PRELOAD", "VLLM_CPU_OMP")


def parse_flags(doc: str | None) -> argparse.Namespace:
    """`--json PATH` and `--quick`; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures, with machine and versions, to this file")
    parser.add_argument("--quick", action="store_true", help="at most two minutes on two cores")
    return parser.parse_args()


def report(name: str, figures: dict[str, Any], json_path: Path | None) -> None:
    """Write the figures to `json_path` if given, and print them as the last line."""
    record = {"benchmark": name, **figures}
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record | {"machine": _machine()}, indent=2) + "\n")
    print(json.dumps(record), flush=True)


def unset_environ() -> dict[str, str]:
    """This process's environment without what sets an OpenMP run-time; vLLM offline, and saying only what is wrong."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_RUNTIME_VARIABLES)}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Worker:
    """A process that answers each line of JSON on its stdin with one on its stdout, where other lines are skipped.

    Attributes:
        ready: its first line, which it prints unasked.

    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], *, stderr: int | None = None) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environ
        )
        self.ready = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)

    def ask(self, job: object) -> Any:
        """Send a job and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a worker ended with {self._process.wait(60)}")


def ratio_figures(key: str, ratios: list[float]) -> dict[str, Any]:
    """The median of `ratios` as `key`, and their range as `key`_range."""
    return {key: round(median(ratios), 3), f"{key}_range": [round(min(ratios), 3), round(max(ratios), 3)]}


def median(values: list[float]) -> float:
    """The middle value; of an even number, the mean of the two in the middle."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _machine() -> dict[str, Any]:
    def version(*names: str) -> str | None:
        for name in names:
            try:
                return f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                continue
        return None

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "vllm": version("vllm-cpu", "vllm"),
        "torch": version("torch"),
        "longtail": version("longtail"),
    }
