"""Weights of a model in shared memory, as its checkpoint has them: the way from a front end to its engine's workers.

    bytes 0 to 16       token, see `shared_memory.py`
    bytes 16 to 24      N, little-endian
    N bytes             index: MessagePack array of (name, dtype, shape, offset)
    at each offset      a tensor, C-contiguous and little-endian; offsets are multiples of 64

The index makes a segment readable for whoever has its path and token; what it says is checked when it is opened.
Views have no copies. Whether the bytes are the right ones is up to checksums, which are not in the segment.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np
import numpy.typing as npt

from longtail.engine.errors import InvalidInputError
from longtail.engine.shared_memory import TOKEN_BYTES, SharedMemory
from longtail.engine.weight_manifest import Manifest, TensorEntry

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
_PAGE = 4096
_LENGTH_BYTES = 8
_INDEX_START = TOKEN_BYTES + _LENGTH_BYTES


class _Place(msgspec.Struct, frozen=True, array_like=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class WeightSegment:
    """Shared memory with all tensors of `manifest`."""

    def __init__(self, memory: SharedMemory, manifest: Manifest, offsets: dict[str, int]) -> None:
        self.manifest = manifest
        self._memory = memory
        self._offsets = offsets

    @classmethod
    def create(cls, manifest: Manifest) -> Self:
        """A segment of zeros. Takes long for a large model.

        Raises:
            OSError: the system has no such memory, or not so much.

        """
        # An offset takes up to 9 bytes in the index, which says where the data begins: so the index is made twice.
        places = [_Place(e.name, e.dtype, e.shape, 1 << 62) for e in manifest]
        start = _up(_INDEX_START + len(msgspec.msgpack.encode(places)), _PAGE)
        offsets: dict[str, int] = {}
        end = start
        for entry in manifest:
            offsets[entry.name] = end
            end = _up(end + entry.num_bytes, _ALIGNMENT)
        index = msgspec.msgpack.encode([_Place(e.name, e.dtype, e.shape, offsets[e.name]) for e in manifest])
        assert _INDEX_START + len(index) <= start
        memory = SharedMemory.create("longtail-weights", _up(end, _PAGE))
        memory.buffer[TOKEN_BYTES:_INDEX_START] = len(index).to_bytes(_LENGTH_BYTES, "little")
        memory.buffer[_INDEX_START : _INDEX_START + len(index)] = index
        return cls(memory, manifest, offsets)

    @classmethod
    def open(cls, path: str, token: str, *, field: str = "path") -> Self:
        """Somebody else's segment; what is written into it stays here.

        Raises:
            InvalidInputError: there is none, or it is not one.

        """
        memory = SharedMemory.open(path, token, private=True, field=field)
        length = int.from_bytes(memory.buffer[TOKEN_BYTES:_INDEX_START], "little")
        try:
            if _INDEX_START + length > memory.num_bytes:
                raise ValueError(f"an index of {length} bytes")
            index = bytes(memory.buffer[_INDEX_START : _INDEX_START + length])
            places = msgspec.msgpack.decode(index, type=list[_Place])
            manifest = Manifest(TensorEntry(p.name, p.dtype, p.shape) for p in places)
            for place in places:
                end = place.offset + manifest.entries[place.name].num_bytes
                if place.offset % _ALIGNMENT or place.offset < _INDEX_START + length or end > memory.num_bytes:
                    raise ValueError(f"{place.name} at {place.offset}")
        except (ValueError, msgspec.DecodeError) as error:
            raise InvalidInputError(field, "a segment of weights", f"{path}: {error}") from error
        return cls(memory, manifest, {place.name: place.offset for place in places})

    @property
    def path(self) -> str:
        """Where other processes of this host find it."""
        return self._memory.path

    @property
    def token(self) -> str:
        """What they have to find there."""
        return self._memory.token

    @property
    def num_bytes(self) -> int:
        """Size of the segment."""
        return self._memory.num_bytes

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, a view of shape [num_bytes]."""
        offset = self._offsets[name]
        view: npt.NDArray[np.uint8] = self._bytes[offset : offset + self.manifest.entries[name].num_bytes]
        return view

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, a view with its dtype and shape."""
        import torch

        entry = self.manifest.entries[name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if not entry.numel:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.from_numpy(self.bytes_of(name)).view(dtype).view(entry.shape)

    def close(self) -> None:
        """Give up the path; the memory goes with the last view of it. Safe to call twice."""
        self.__dict__.pop("_bytes", None)
        self._memory.close()

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._memory.buffer, np.uint8)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
