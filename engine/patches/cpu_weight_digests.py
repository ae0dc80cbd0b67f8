"""Digests of a CPU's weights are of what the model computes with.

On a CPU linear layers compute with packed copies of their weights, and most keep nothing else. Stock's digests are of
the parameters, which are empty then, so that any two models of one shape have the same digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longtail.engine.patches.entry import Change, Entry, Source

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = 64


def _make_digests(stock: Any, owner: Any) -> Any:
    def compute_tensor_digests(model: Any) -> dict[str, str]:
        digests: dict[str, str] = stock(model)
        for name, layer in model.named_modules():
            if hasattr(layer, "cpu_linear") and (width := _input_width(layer)) is not None:
                digest = hashlib.sha256()
                for columns in _packed_columns(layer, width):
                    digest.update(columns.numpy().data)
                digests[f"{name}.packed"] = digest.hexdigest()
        return digests

    return compute_tensor_digests


def _packed_columns(layer: Any, width: int) -> Iterator[Tensor]:
    """What a layer's kernel has for its weight, some columns at a time as bytes: its products with unit vectors.

    Exact, because each is a sum of one element and zeros; only the sign of a zero is lost.
    """
    import torch

    dtype = layer.weight.dtype
    with torch.inference_mode():
        for start in range(0, width, _COLUMNS):
            units = torch.zeros(min(_COLUMNS, width - start), width, dtype=dtype)
            units.diagonal(start).fill_(1)
            yield layer.cpu_linear(units, layer.weight, None).contiguous().view(-1).view(torch.uint8)


def _input_width(layer: Any) -> int | None:
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    return None


ENTRY = Entry(
    name="cpu-weight-digests",
    what="Weight digests on a CPU include the packed weights of linear layers.",
    why="Digests of two models are equal whatever their linear layers are, so that they verify nothing.",
    upstream=(),
    versions=("0.32.0",),
    where="cpu",
    changes=(
        Change(
            "vllm.model_executor.model_loader.weight_checksum",
            "compute_tensor_digests",
            _make_digests,
            "f347d36eac521390",
        ),
    ),
    relies_on=(
        Source("vllm.v1.worker.gpu_worker", "Worker.compute_weight_checksums", "d18e1008aab676f9"),
        Source("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "ec79d3cea7cf1256"),
        Source("vllm.model_executor.layers.utils", "cpu_unquantized_gemm", "cd52ade3e7be3efe"),
    ),
)
