"""Two kills each of trainer, engine core and service; `make chaos` has twenty."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chaos import run_chaos


def test_nothing_is_lost_or_trained_twice_when_processes_are_killed(tmp_path: Path) -> None:
    done = run_chaos(tmp_path, kills_each=2, seed=1)
    assert done["steps"] > 6
    assert done["pushes"] > 6
