"""The weights that an engine has, kept by its trainer as the base of differences.

A copy of the model in host memory, whose buffers are used again. It is what the engine has, or it is nothing: it
changes when the engine has taken a push, and a push that failed after it had to change before is the end of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from longtail.trainer_bridge.delta import Delta, apply, bits_of, changed, index_bytes
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.host_tensors import HostTensor
from longtail.trainer_bridge.wire import ITEM_BYTES

#: Bytes that are compared and hashed at a time; two such blocks fit into a core's cache.
_BLOCK_BYTES = 1 << 17
#: A difference above this share of its tensor is sent as the tensor.
_LARGEST_SHARE = 0.5

Bytes = npt.NDArray[np.uint8]


class Difference(NamedTuple):
    """A tensor against its base.

    Attributes:
        checksum: of the new tensor.
        num_changed: elements.
        payload: indices and values, as they are sent.
        is_larger: it is better sent whole; there is no payload then.

    """

    checksum: str
    num_changed: int
    payload: Bytes
    is_larger: bool


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
        old, new = bits_of(base, item_bytes), bits_of(tensor.data, item_bytes)
        block = max(1, _BLOCK_BYTES // item_bytes)
        most = _LARGEST_SHARE * len(base) / (index_bytes(numel) + item_bytes)
        hasher = xxhash.xxh3_128()
        parts: list[Delta] = []
        num_changed = 0
        for start in range(0, len(new), block):
            part = new[start : start + block]
            hasher.update(part)
            if num_changed <= most:
                parts.append(changed(old[start : start + block], part, start=start, numel=numel))
                num_changed += len(parts[-1].indices)
        checksum = hasher.hexdigest()
        if num_changed > most:
            return Difference(checksum, num_changed, tensor.data[:0], True)
        payload, delta = _payload(parts, num_changed, index_bytes(numel), item_bytes)
        self._pending[name] = (item_bytes, delta)
        return Difference(checksum, num_changed, payload, False)

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
        """There is no base any more. Its memory goes when it is not used again."""
        self.version = None
        self._pending.clear()


def _payload(parts: list[Delta], num_changed: int, index_size: int, item_bytes: int) -> tuple[Bytes, Delta]:
    """All parts in one buffer, and views of it."""
    payload = np.empty(num_changed * (index_size + item_bytes), np.uint8)
    middle = num_changed * index_size
    views = Delta(bits_of(payload[:middle], index_size), bits_of(payload[middle:], item_bytes))
    for view, arrays in zip(views, zip(*parts, strict=True), strict=False):
        np.concatenate(arrays, out=view)
    return payload, views
