"""What files that must survive a crash have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync_folder(path: Path) -> None:
    """A file that was just made or renamed can vanish with the machine until its folder is synced."""
    descriptor = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, suffix: str = ".new") -> Iterator[Path]:
    """A path to write a file to, which has the name of `path` when the block ends, whole and on the disk.

    If the block fails, what `path` was before stays, and the other file goes. `suffix` tells the two apart.
    """
    new = path.with_name(path.name + suffix)
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path)
