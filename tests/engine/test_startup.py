"""Every way to start the core gives the same engine, and leaves this process as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longtail.engine.config import EngineConfig
from longtail.engine.cpu_machine import Machine, probe_machine
from longtail.engine.startup import fast_start

pytestmark = pytest.mark.timeout(600)

SCRIPT = """
import json, multiprocessing, os, sys
if sys.argv[3] == "torch first":
    import torch
from longtail.engine import EngineConfig, RolloutEngine, SamplingConfig

if __name__ == "__main__":
    before = dict(os.environ)
    config = EngineConfig(
        model=sys.argv[1], core=sys.argv[2], block_size=32, max_model_len=512, max_num_seqs=8, kv_cache_gib=0.1
    )
    with RolloutEngine(config) as engine:
        sampling = SamplingConfig(temperature=0.0, max_tokens=24, ignore_eos=True)
        got = engine.rollout([[5, 6, 7], [11, 3]], sampling=sampling)
        made = [type(process).__name__ for process in multiprocessing.active_children()]
        pids = list(engine.core_pids)
    names = ("LD_PRELOAD", "OMP_NUM_THREADS", "KMP_BLOCKTIME", "TORCHDYNAMO_DISABLE", "VLLM_CPU_OMP_THREADS_BIND")
    print("RESULT", json.dumps({
        "made": made,
        "tokens": [trajectory.output_token_ids for trajectory in got.trajectories],
        "changed": [name for name in names if before.get(name) != os.environ.get(name)],
        "left": [pid for pid in pids if os.path.exists(f"/proc/{pid}")],
    }))
"""


def start(folder: Path, model: Path, core: str, first: str) -> dict[str, Any]:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, str(script), str(model), core, first],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return answer


def test_forked_lent_and_inline_cores_are_the_same_engine(tmp_path: Path, tiny_model: Path) -> None:
    forked = start(tmp_path, tiny_model, "process", "")
    lent = start(tmp_path, tiny_model, "process", "torch first")
    inline = start(tmp_path, tiny_model, "inline", "")
    if probe_machine().intel_openmp is not None:
        assert forked["made"] == ["_ForkedProcess"]
    assert lent["made"] == ["_LentProcess"]
    assert inline["made"] == []
    assert [len(tokens) for tokens in forked["tokens"]] == [24, 24]
    assert forked["tokens"] == lent["tokens"] == inline["tokens"]
    for answer in (forked, lent, inline):
        assert answer["changed"] == []
        assert answer["left"] == []


def test_on_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(runs_on_cpu=False, num_cores=4)
    monkeypatch.setattr("longtail.engine.runtime.probe_machine", lambda environ: machine)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with fast_start(EngineConfig(model="any"), tmp_path) as runtime:
        assert not runtime.applies
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert "TORCHDYNAMO_DISABLE" not in os.environ
