"""A trainer's tensors as bytes in host memory: NumPy, torch and CuPy arrays, and what has `__array__`.

Nothing here imports torch or CuPy: an array brings its library. What lies contiguous in host memory is not copied.
bfloat16 and float8 need no support of NumPy: a tensor is its dtype's name, its shape and its bytes.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge.wire import ITEM_BYTES, TensorSpec


class HostTensor(NamedTuple):
    """A tensor and its bytes, shape [num_bytes]."""

    spec: TensorSpec
    data: npt.NDArray[np.uint8]


def host_tensor(name: str, array: Any) -> HostTensor:
    """The bytes of a tensor; from another device they are copied.

    Raises:
        InvalidInputError: it is no tensor, or its dtype has no name on the wire.

    """
    library = type(array).__module__.partition(".")[0]
    if hasattr(array, "full_tensor"):
        # A sharded tensor of torch: every process of its mesh must come here.
        array, library = array.full_tensor(), "torch"
    if library == "torch" or (library != "numpy" and _is_torch(array)):
        dtype = str(array.dtype).removeprefix("torch.")
        shape = tuple(array.shape)
        data = _checked(name, dtype, lambda: _torch_bytes(array))
    else:
        if library == "cupy":
            array = array.get()
        array = np.asarray(array)
        dtype, shape = array.dtype.name, array.shape
        data = _checked(name, dtype, lambda: _numpy_bytes(array))
    return HostTensor(TensorSpec(name, dtype, shape), data)


def _checked(name: str, dtype: str, read: Any) -> npt.NDArray[np.uint8]:
    if dtype not in ITEM_BYTES:
        raise InvalidInputError(f"named_tensors[{name}].dtype", "one of " + ", ".join(ITEM_BYTES), dtype)
    data: npt.NDArray[np.uint8] = read()
    return data


def _is_torch(array: Any) -> bool:
    """Subclasses live in their own modules."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _torch_bytes(tensor: Any) -> npt.NDArray[np.uint8]:
    import torch

    data: npt.NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def _numpy_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
