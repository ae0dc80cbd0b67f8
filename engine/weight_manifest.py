"""What tensors a model's checkpoint has: names, shapes and dtypes, read from the headers of its safetensors files.

No weight is read, and nothing here imports torch. The bytes of a tensor are described by where they are in a file, so
that a copy of them needs no other library either. Checkpoints in other formats are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from longtail.engine.errors import InvalidInputError

#: Bytes of one element, by the name that torch has for the dtype.
ITEM_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

_FROM_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
#: The bound of the format itself.
_MAX_HEADER_BYTES = 100_000_000


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of a checkpoint; `dtype` is one of `ITEM_BYTES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return self.numel * ITEM_BYTES[self.dtype]


class StoredTensor(NamedTuple):
    """Where a checkpoint has the bytes of a tensor."""

    entry: TensorEntry
    path: Path
    offset: int


class Manifest:
    """The tensors of one model, in the order in which they are stored.

    Raises:
        InvalidInputError: two have one name, or a dtype or shape is none.

    """

    def __init__(self, entries: Iterable[TensorEntry]) -> None:
        self.entries: dict[str, TensorEntry] = {}
        for entry in entries:
            if entry.dtype not in ITEM_BYTES:
                raise InvalidInputError(f"tensors[{entry.name}].dtype", "one of " + ", ".join(ITEM_BYTES), entry.dtype)
            if any(size < 0 for size in entry.shape):
                raise InvalidInputError(f"tensors[{entry.name}].shape", "sizes of 0 or more", entry.shape)
            if entry.name in self.entries:
                raise InvalidInputError(f"tensors[{entry.name}]", "each name once", "it is there twice")
            self.entries[entry.name] = entry

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Self:
        """Of a folder with safetensors files.

        Raises:
            InvalidInputError: it has none, or one that is not whole.

        """
        return cls(stored.entry for stored in stored_tensors(folder))

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.entries.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.num_bytes for entry in self)

    def check_same(self, other: Iterable[TensorEntry], field: str) -> None:
        """Check that `other` has exactly these tensors, in any order.

        Raises:
            InvalidInputError: names the first that differs, below `field`.

        """
        seen = set()
        for got in other:
            seen.add(got.name)
            if (entry := self.entries.get(got.name)) is None:
                raise InvalidInputError(field, "only tensors that the checkpoint has", got.name)
            for what in ("dtype", "shape"):
                if (expected := getattr(entry, what)) != getattr(got, what):
                    raise InvalidInputError(f"{field}[{got.name}].{what}", str(expected), getattr(got, what))
        if missing := [name for name in self.entries if name not in seen]:
            raise InvalidInputError(field, f"all {len(self)} tensors of the checkpoint", f"no {', '.join(missing[:3])}")


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of a checkpoint folder, as its headers have them.

    Raises:
        InvalidInputError: it has no safetensors files, or one that is not whole.

    """
    found: list[StoredTensor] = []
    for path in _weight_files(folder):
        found += _read_header(path)
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    try:
        if index.is_file():
            return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidInputError("checkpoint", f"a whole {_INDEX} in {folder}", repr(error)) from error
    # Mistral's files have the weights a second time, under other names.
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise InvalidInputError("checkpoint", "a folder with .safetensors files", str(folder))
    return files


def _read_header(path: Path) -> list[StoredTensor]:
    """Format: 8 bytes N, N bytes of JSON, then the data that `data_offsets` count from."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header: dict[str, Any] = json.loads(file.read(size))
            end = file.seek(0, 2)
        header.pop("__metadata__", None)
        found = [_entry(path, 8 + size, name, fields) for name, fields in header.items()]
        for stored in found:
            if stored.offset < 8 + size or stored.offset + stored.entry.num_bytes > end:
                raise ValueError(f"{stored.entry.name} is outside the file")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidInputError("checkpoint", f"a whole safetensors file in {path}", repr(error)) from error
    return sorted(found, key=lambda stored: stored.offset)


def _entry(path: Path, data_start: int, name: str, fields: dict[str, Any]) -> StoredTensor:
    dtype = _FROM_SAFETENSORS.get(fields["dtype"])
    if dtype is None:
        raise ValueError(f"{name} has the dtype {fields['dtype']}, which cannot be pushed")
    begin, end = fields["data_offsets"]
    entry = TensorEntry(name, dtype, tuple(fields["shape"]))
    if end - begin != entry.num_bytes:
        raise ValueError(f"{name} has {end - begin} bytes instead of {entry.num_bytes}")
    return StoredTensor(entry, path, data_start + begin)
