"""longtail as a worker process for `tree.py`, which has the job: trees that the scheduler grows.

Arguments: the model folder, and fields of `EngineConfig` as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from longtail.engine import EngineConfig, Prompt, RolloutEngine, SamplingConfig, TreeSpec


def main() -> None:
    """Serve jobs until stdin ends."""
    with RolloutEngine(EngineConfig(model=sys.argv[1], **json.loads(sys.argv[2]))) as engine:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            print(json.dumps(run(engine, **json.loads(line))), flush=True)


def run(
    engine: RolloutEngine, prompts: list[list[int]], tree: dict[str, Any], ignore_eos: bool, seed: int, **_: object
) -> dict[str, Any]:
    """Grow one tree a prompt."""
    engine.declare_weights()  # nothing of the last run is in the prefix cache
    spec = TreeSpec(**tree)
    start, cpu_start = time.perf_counter(), time.process_time()
    sampling = SamplingConfig(ignore_eos=ignore_eos, max_tokens=spec.max_tokens, tree=spec)
    got = engine.rollout([Prompt(token_ids=ids, seed=None) for ids in prompts], sampling=sampling, round_id=f"r{seed}")
    times = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    leaves = got.trajectories
    assert all(one.ended_by_itself for one in leaves)
    assert not ignore_eos or all(len(one.output_token_ids) == spec.max_tokens for one in leaves)
    return times | {
        "num_leaves": len(leaves),
        "num_computed": sum(one.tokens.scheduled for one in leaves),
        "num_recomputed": sum(one.tokens.recomputed for one in leaves),
        "num_output_tokens": sum(len(one.output_token_ids) for one in leaves),
    }


if __name__ == "__main__":
    main()
