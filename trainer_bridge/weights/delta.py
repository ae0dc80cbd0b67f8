"""The difference between two versions of a tensor: which elements changed, and to what.

Elements are compared as bits, on arrays of unsigned integers of the element's size: a NaN that stays is no change,
-0.0 for 0.0 is one, and what comes out of `apply` is exactly what went into `changed`. `changed` is written over the
array API standard, so that NumPy's and CuPy's arrays serve; the standard has no views of bits (`bits_of`, NumPy and
CuPy) and no scattering (`apply`, NumPy and CuPy).
"""

from __future__ import annotations

from typing import Any, NamedTuple

#: Elements that are compared at a time: two blocks of 4-byte elements and the result fit into a core's cache.
_BLOCK = 1 << 17

_MAX_NUMEL_OF_U32 = 1 << 32


class Delta(NamedTuple):
    """Changed elements of a tensor.

    Attributes:
        indices: into the flat tensor, ascending, uint32 or uint64, see `index_bytes`; shape [num_changed].
        values: their new bits, unsigned; shape [num_changed].

    """

    indices: Any
    values: Any


def index_bytes(numel: int) -> int:
    """Bytes of an index into a tensor of `numel` elements."""
    return 4 if numel < _MAX_NUMEL_OF_U32 else 8


def bits_of(array: Any, item_bytes: int) -> Any:
    """A flat view of a contiguous NumPy or CuPy array as unsigned integers of `item_bytes`."""
    return array.reshape(-1).view(f"u{item_bytes}")


def changed(old: Any, new: Any, *, start: int = 0, numel: int | None = None, block: int = _BLOCK) -> Delta:
    """What has to change in `old` to make it `new`.

    Args:
        old: bits of the one, of any array that follows the standard; shape [n].
        new: bits of the other, of the same dtype and shape.
        start: flat index of the first element, for a part of a tensor.
        numel: elements of the whole tensor; n by default.
        block: elements compared at a time, which bounds the memory that it takes besides the result.

    """
    assert old.shape == new.shape
    assert old.dtype == new.dtype
    xp = old.__array_namespace__()
    size = old.shape[0]
    dtype = xp.uint32 if index_bytes(size if numel is None else numel) == 4 else xp.uint64
    indices: list[Any] = []
    values: list[Any] = []
    for first in range(0, size, block):
        # The standard says nothing of slices beyond the end.
        end = min(first + block, size)
        part = new[first:end]
        (found,) = xp.nonzero(old[first:end] != part)
        if found.shape[0]:
            indices.append(xp.astype(found + (first + start), dtype))
            values.append(xp.take(part, found, axis=0))
    if not indices:
        return Delta(xp.zeros(0, dtype=dtype), new[:0])
    return Delta(xp.concat(indices), xp.concat(values))


def apply(target: Any, delta: Delta) -> None:
    """Change `target`, flat bits of a NumPy or CuPy array, in place."""
    target[delta.indices] = delta.values
