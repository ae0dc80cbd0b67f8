"""Small sets of weights for tests of pushes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longtail.engine.weight_manifest import ITEM_BYTES, Manifest, TensorEntry
from longtail.engine.weight_segment import WeightSegment
from longtail.trainer_bridge.wire import TensorSpec

ENTRIES = [
    TensorEntry("embed", "float32", (13, 7)),
    TensorEntry("norm", "bfloat16", (9,)),
    TensorEntry("scalar", "int64", ()),
    TensorEntry("empty", "float32", (0, 4)),
    TensorEntry("double", "float64", (31,)),
    TensorEntry("head", "float16", (21,)),
]
MANIFEST = Manifest(ENTRIES)

Weights = dict[str, npt.NDArray[np.uint8]]


def random_weights(seed: int) -> Weights:
    """The bytes of each tensor."""
    rng = np.random.default_rng(seed)
    return {entry.name: rng.integers(0, 256, entry.num_bytes, np.uint8) for entry in ENTRIES}


def changed_weights(weights: Weights, seed: int, share: float = 0.1) -> Weights:
    """Some bytes changed, in some tensors."""
    rng = np.random.default_rng(seed)
    found = {name: data.copy() for name, data in weights.items()}
    for data in found.values():
        if len(data) and rng.random() < 0.7:
            data[rng.random(len(data)) < share] ^= 1
    return found


def spec_of(name: str) -> TensorSpec:
    entry = MANIFEST.entries[name]
    return TensorSpec(name, entry.dtype, entry.shape)


def arrays_of(weights: Weights) -> list[tuple[str, Any]]:
    """As a trainer has them: torch's where NumPy has no such dtype."""
    import torch

    found: list[tuple[str, Any]] = []
    for entry in ENTRIES:
        data = weights[entry.name].copy()
        if entry.dtype == "bfloat16":
            found.append((entry.name, torch.from_numpy(data).view(torch.bfloat16).reshape(entry.shape)))
        else:
            found.append((entry.name, data.view(entry.dtype).reshape(entry.shape)))
    return found


def staged_bytes(update_info: dict[str, Any]) -> dict[str, bytes]:
    """What an engine would read."""
    segment = WeightSegment.open(update_info["path"], update_info["token"])
    return {entry.name: segment.bytes_of(entry.name).tobytes() for entry in ENTRIES}


def as_bytes(weights: Weights) -> dict[str, bytes]:
    return {name: data.tobytes() for name, data in weights.items()}


def write_checkpoint(folder: Path, weights: Weights) -> Path:
    """A folder with a safetensors file."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for entry in ENTRIES:
        data = torch.from_numpy(weights[entry.name].copy()) if entry.numel else torch.empty(0, dtype=torch.uint8)
        tensors[entry.name] = data.view(getattr(torch, entry.dtype)).reshape(entry.shape)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


__all__ = ["ENTRIES", "ITEM_BYTES", "MANIFEST", "arrays_of", "as_bytes", "changed_weights", "random_weights", "spec_of"]
