"""longtail as a worker process for `interleave.py`, which has the job: a hook appends what the environment says.

Arguments: the model folder, and fields of `EngineConfig` as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from longtail.engine import EngineConfig, Prompt, RolloutEngine, SamplingConfig
from longtail.engine.carry_config import CarryConfig
from longtail.engine.trajectory import Boundary, Trajectory
from longtail.hooks import Append, Continue, Decision, Hooks


class Environment:
    """Appends the next observation at every boundary; it takes no time to make one up."""

    on_failure = "raise"

    def __init__(self) -> None:
        self.observations: list[list[list[int]]] = []

    async def on_boundary(self, trajectory: Trajectory, boundary: Boundary) -> Decision:
        mine = self.observations[trajectory.metadata["place"]]
        number = len(trajectory.boundaries) - 1
        return Append(mine[number]) if number < len(mine) else Continue()


def main() -> None:
    """Serve jobs until stdin ends."""
    environment = Environment()
    config = EngineConfig(model=sys.argv[1], carry=CarryConfig(), **json.loads(sys.argv[2]))
    with Hooks([environment]) as hooks, RolloutEngine(config, hooks) as engine:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            print(json.dumps(run(engine, environment, **json.loads(line))), flush=True)


def run(
    engine: RolloutEngine,
    environment: Environment,
    prompts: list[list[int]],
    observations: list[list[list[int]]],
    segment_tokens: int,
    **_: object,
) -> dict[str, Any]:
    """Collect one trajectory a prompt."""
    environment.observations = observations
    engine.declare_weights()  # nothing of the last run is in the prefix cache
    start, cpu_start = time.perf_counter(), time.process_time()
    budgets = [segment_tokens * (len(row) + 1) + sum(map(len, row)) for row in observations]
    sampling = SamplingConfig(ignore_eos=True, max_tokens=max(budgets), boundary_every=segment_tokens)
    given = [
        Prompt(token_ids=ids, max_tokens=[budget], metadata={"place": place})
        for place, (ids, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]
    got = engine.rollout(iter(given), target_groups=len(given), sampling=sampling)
    times = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    lengths = {t.metadata["place"]: (t.source_mask.count(1), t.source_mask.count(0)) for t in got.trajectories}
    assert all(
        lengths[i] == (segment_tokens * (len(row) + 1), sum(map(len, row))) for i, row in enumerate(observations)
    )
    return times | {
        "num_sampled": sum(sampled for sampled, _ in lengths.values()),
        "num_recomputed": sum(t.tokens.recomputed for t in got.trajectories),
    }


if __name__ == "__main__":
    main()
