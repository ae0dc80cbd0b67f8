"""How long from the start of a process to its first token, longtail with its defaults against stock vLLM?

Each start is a fresh Python that holds SmolLM2-135M in float32, generates one token and ends. Arms alternate:

    stock     `LLM(model)` in-process, with its best flags: `enforce_eager`, and a KV cache of longtail's default size
              (its own default takes 92 % of the memory, which alone costs more than the rest)
    process   longtail's defaults: the engine core in a process of its own
    inline    longtail with the core in this process, as stock has it

Stock returns no log-probabilities here, longtail does: with them stock also compiles a helper for 5 s at its first
token. File caches and vLLM's cache of model classes are warm.

Last line: one JSON object with `startup_ratio` (process / stock, median over rounds), `startup_ratio_inline`, the
range of each, and the same of CPU time, which other work on the machine disturbs less (`cpu_ratio`,
`cpu_ratio_inline`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_io

from longtail.engine import EngineConfig
from longtail.engine.models import resolve_model

MODEL = "smollm2"
TIMEOUT_S = 600

_FIRST_TOKEN = re.compile(r"^first token at ([\d.]+)$", re.MULTILINE)
_STOCK = """
import sys, time
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=int(sys.argv[2]))
    outputs = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 1
    print("first token at", time.monotonic(), flush=True)
"""
_LONGTAIL = """
import sys, time
from longtail.engine import EngineConfig, RolloutEngine, SamplingConfig
if __name__ == "__main__":
    with RolloutEngine(EngineConfig(model=sys.argv[1], core=sys.argv[2])) as engine:
        got = engine.rollout([[1, 2, 3]], group_size=1, sampling=SamplingConfig(max_tokens=1))
        assert len(got.trajectories[0].output_token_ids) == 1
        print("first token at", time.monotonic(), flush=True)
"""


@dataclass(frozen=True)
class Start:
    """One start: wall seconds to the first token, CPU seconds of all its processes to their end."""

    seconds: float
    cpu_seconds: float


def main() -> None:
    """Run the arms and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    model_dir = resolve_model(MODEL)
    kv_bytes = int(EngineConfig(model=MODEL).kv_cache_gib * (1 << 30))
    num_rounds = 2 if flags.quick else 7
    # Longtail goes first: the first start of all also reads the files for those that follow.
    arms = ["process", "inline", "stock"]
    starts: dict[str, list[Start]] = {arm: [] for arm in arms}
    print(f"{'round':<6} {'arm':<8} {'first token s':>14} {'CPU s':>7}")
    for number in range(num_rounds):
        for arm in arms[:: 1 if number % 2 == 0 else -1]:
            if arm == "inline" and flags.quick and number > 0:
                continue
            start = _start(arm, model_dir, kv_bytes)
            starts[arm].append(start)
            print(f"{number + 1:<6} {arm:<8} {start.seconds:>14.2f} {start.cpu_seconds:>7.2f}", flush=True)
    figures: dict[str, Any] = {"num_rounds": num_rounds}
    for arm, suffix in (("process", ""), ("inline", "_inline")):
        pairs = list(zip(starts[arm], starts["stock"], strict=not flags.quick))
        figures |= bench_io.ratio_figures(
            f"startup_ratio{suffix}", [ours.seconds / stock.seconds for ours, stock in pairs]
        )
        figures |= bench_io.ratio_figures(
            f"cpu_ratio{suffix}", [ours.cpu_seconds / stock.cpu_seconds for ours, stock in pairs]
        )
    for arm in arms:
        figures[f"{arm}_s"] = round(bench_io.median([start.seconds for start in starts[arm]]), 2)
    bench_io.report("startup", figures, flags.json)


def _start(arm: str, model_dir: Path, kv_bytes: int) -> Start:
    """One start of one arm, from before its interpreter to after its end."""
    environ = bench_io.unset_environ()
    if arm == "stock":
        command = [_STOCK, str(model_dir), str(kv_bytes)]
        # Without longtail's plugin, and in-process as `LLM` users who want a fast start run it.
        environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    else:
        command = [_LONGTAIL, str(model_dir), arm]
    before = os.times()
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", *command], env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    after = os.times()
    if done.returncode != 0 or (first := _FIRST_TOKEN.search(done.stdout)) is None:
        raise RuntimeError(f"the {arm} arm failed:\n{done.stdout}\n{done.stderr}")
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return Start(float(first[1]) - begin, cpu_seconds)


if __name__ == "__main__":
    main()
