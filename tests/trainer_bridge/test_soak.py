"""One minute of the soak; `python tests/trainer_bridge/soak.py` is half an hour."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from soak import run_soak


def test_nothing_grows_in_a_loop_with_faults(tmp_path: Path) -> None:
    steps, _ = run_soak(tmp_path, minutes=1.0, seed=2)
    assert steps > 3
