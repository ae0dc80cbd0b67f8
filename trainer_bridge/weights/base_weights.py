"""The weights that an engine has, kept by its trainer as the base of differences.

A copy of the model in host memory, whose buffers are used again. It is what the engine has, or it is nothing: it
changes when the engine has taken a push, and a push that failed after it had to change before is the end of it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.weights.delta import Delta, apply, bits_of, changed, index_bytes
from longtail.trainer_bridge.weights.host_tensors import HostTensor
from longtail.trainer_bridge.weights.manifest import checksum
from longtail.trainer_bridge.wire import ITEM_BYTES

#: Bytes of a tensor that one thread compares.
_PART_BYTES = 1 << 22
_MAX_THREADS = 4
_CORES = len(os.sched_getaffinity(0))
#: With no more, threads that compare hold each other up, and a service on the same machine.
_FEW_CORES = 2
#: Elements by which a tensor is judged that changed as a whole, as a step of most optimisers makes it.
_PROBE = 1 << 14
#: A difference above this share of its tensor is sent as the tensor.
_LARGEST_SHARE = 0.5

Bytes = npt.NDArray[np.uint8]


class Difference(NamedTuple):
    """A tensor against its base.

    Attributes:
        checksum: of the new tensor; `None` if it is better sent whole, and nothing else of this is known.
        num_changed: elements.
        payload: indices and values, as they are sent.

    """

    checksum: str | None
    num_changed: int
    payload: Bytes


class BaseWeights:
    """See the module.

    Attributes:
        version: of the engine's weights; `None` while there is no base.

    """

    def __init__(self) -> None:
        self.version: int | None = None
        self._tensors: dict[str, Bytes] = {}
        self._pending: dict[str, tuple[int, Delta]] = {}
        self._has_changed = False
        self._threads: ThreadPoolExecutor | None = None

    def keep(self, name: str, data: Bytes) -> None:
        """Take a whole tensor, before the engine has it."""
        self._has_changed = True
        target = self._tensors.get(name)
        if target is None or len(target) != len(data):
            target = self._tensors[name] = np.empty_like(data)
        target[:] = data

    def difference(self, tensor: HostTensor) -> Difference:
        """What changed in a tensor; the base itself changes in `accept`.

        Raises:
            InvalidInputError: the base has no such tensor.

        """
        name, numel, item_bytes = tensor.spec.name, tensor.spec.numel, ITEM_BYTES[tensor.spec.dtype]
        base = self._tensors.get(name)
        if base is None or len(base) != len(tensor.data):
            got = None if base is None else f"{len(tensor.data)} bytes instead of {len(base)}"
            raise InvalidInputError(f"named_tensors[{name}]", "the tensors that were pushed before", got)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(_MAX_THREADS, _CORES), thread_name_prefix="longtail-delta")
        old, new = bits_of(base, item_bytes), bits_of(tensor.data, item_bytes)
        largest = _LARGEST_SHARE * item_bytes / (index_bytes(numel) + item_bytes)
        if np.count_nonzero(old[:_PROBE] != new[:_PROBE]) > largest * min(_PROBE, numel):
            return Difference(None, 0, tensor.data[:0])
        compare = partial(_compare, old, new, _PART_BYTES // item_bytes)
        starts = range(0, numel, _PART_BYTES // item_bytes)
        if len(starts) > 1:
            found = self._threads.submit(checksum, tensor.data.data)
            parts = list(self._threads.map(compare, starts) if _CORES > _FEW_CORES else map(compare, starts))
            new_checksum = found.result()
        else:
            parts, new_checksum = [compare(start) for start in starts], checksum(tensor.data.data)
        num_changed = sum(len(part.indices) for part in parts)
        if num_changed > largest * numel:
            return Difference(None, 0, tensor.data[:0])
        payload, delta = _payload(parts, num_changed, index_bytes(numel), item_bytes)
        self._pending[name] = (item_bytes, delta)
        return Difference(new_checksum, num_changed, payload)

    def accept(self, version: int) -> None:
        """The engine has what was pushed."""
        for name, (item_bytes, delta) in self._pending.items():
            apply(bits_of(self._tensors[name], item_bytes), delta)
        self._pending.clear()
        self._has_changed = False
        self.version = version

    def reject(self) -> None:
        """The engine has what it had."""
        self._pending.clear()
        if self._has_changed:
            self.version = None
            self._has_changed = False

    def forget(self) -> None:
        """There is no base any more; its memory is kept for the next one."""
        self.version = None
        self._pending.clear()

    def close(self) -> None:
        """Give up memory and threads."""
        self.forget()
        self._tensors.clear()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def _compare(old: npt.NDArray[Any], new: npt.NDArray[Any], size: int, start: int) -> Delta:
    """Of `size` elements from `start`."""
    return changed(old[start : start + size], new[start : start + size], start=start, numel=len(new))


def _payload(parts: list[Delta], num_changed: int, index_size: int, item_bytes: int) -> tuple[Bytes, Delta]:
    """All parts in one buffer, and views of it."""
    payload = np.empty(num_changed * (index_size + item_bytes), np.uint8)
    middle = num_changed * index_size
    views = Delta(bits_of(payload[:middle], index_size), bits_of(payload[middle:], item_bytes))
    for view, arrays in zip(views, zip(*parts, strict=True), strict=False):
        np.concatenate(arrays, out=view)
    return payload, views
