"""What files that must survive a crash have in common."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """A file that was just made or renamed can vanish with the machine until its folder is synced."""
    descriptor = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
