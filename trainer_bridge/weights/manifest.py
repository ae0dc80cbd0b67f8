"""Checksums of tensors, and the digest that names all weights of a version.

The tensors of a model are those of its checkpoint: `longtail.engine.weight_manifest.Manifest`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import xxhash

_CHECKSUM = re.compile(r"[0-9a-f]{32}")


def checksum(data: Any) -> str:
    """XXH3-128 (seed 0) of a contiguous buffer, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def is_checksum(text: str) -> bool:
    """`text` has the form of a checksum or digest."""
    return _CHECKSUM.fullmatch(text) is not None


def digest_of(checksums: Mapping[str, str]) -> str:
    """The digest of a version: of the names and checksums of all its tensors, in any order."""
    # Python orders text by code points, which is the order of its UTF-8.
    lines = (f"{name}\0{checksums[name]}\n" for name in sorted(checksums))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())
