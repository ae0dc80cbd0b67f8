"""What does longtail's scheduler cost on top of stock vLLM's, per step?

1,024 requests decode at once; the model is faked, so only `schedule()` and `update_from_output()` are timed, in thread
CPU time. Each block of steps runs on every arm, in an order that is shuffled per block, and ratios are taken inside the
block.

Arms: `stock` twice (its ratio to itself is the noise), longtail without rollout metadata (`off`: what every plain
request pays), longtail with all 1,024 requests in rounds (`on`), and both with 10,000 parked trajectories besides.
These two are compared with a stock scheduler that has served the same 10,000 requests (`stock, served`): objects that
are made later lie scattered in memory, which alone costs some per cent.

Last line: one JSON object with `overhead_ratio` (off / stock, median of paired blocks), `overhead_ratio_on`,
`overhead_ratio_parked` (off, with parked trajectories), `overhead_ratio_parked_on`, `noise_ratio` (stock / stock),
`served_ratio` (stock, served / stock), and the 10th and 90th percentile of each.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import bench_io
import scheduler_harness
from scheduler_harness import SchedulerHarness
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from longtail.scheduler.rollout_scheduler import RolloutScheduler

NUM_REQUESTS = 1024
GROUP_SIZE = 8
STEPS_PER_BLOCK = 8
PROMPT_TOKENS = 64
NUM_PARKED = 10_000
#: A parked trajectory has prompt and a few tokens: three blocks of 32.
NUM_BLOCKS = NUM_REQUESTS * 64 + NUM_PARKED * 4


def main() -> None:
    """Run the arms and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    num_blocks = 40 if flags.quick else 150
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = scheduler_harness.write_model_config(Path(folder))
        arms = {
            "stock": _filled(Scheduler, model_dir, in_rounds=False),
            "stock again": _filled(Scheduler, model_dir, in_rounds=False),
            "off": _filled(RolloutScheduler, model_dir, in_rounds=False),
            "on": _filled(RolloutScheduler, model_dir, in_rounds=True),
            "parked": _filled(RolloutScheduler, model_dir, in_rounds=False, num_before=NUM_PARKED),
            "parked, on": _filled(RolloutScheduler, model_dir, in_rounds=True, num_before=NUM_PARKED),
            "stock, served": _filled(Scheduler, model_dir, in_rounds=False, num_before=NUM_PARKED),
        }
        gc.collect()
        gc.freeze()  # as the engine core does once it is up
        gc.disable()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for block in range(num_blocks):
            order = list(arms)
            rng.shuffle(order)
            for name in order:
                seconds[name].append(_time_block(arms[name]))
            if block % 10 == 9:
                gc.collect()
                print(f"block {block + 1}/{num_blocks}", flush=True)
        gc.unfreeze()
        gc.enable()
    figures: dict[str, Any] = {"num_requests": NUM_REQUESTS, "num_parked": NUM_PARKED, "num_blocks": num_blocks}
    for name in ("parked", "parked, on"):
        left = arms[name].scheduler.rollout_rpc("counters", {})
        assert (left["parked_trajectories"], left["parked_lost_tokens"]) == (NUM_PARKED, 0)
    print(f"{'arm':<13} {'ms a step':>10} {'ratio to':>14} {'ratio':>8} {'p10':>8} {'p90':>8}")
    for name, baseline, key in (
        ("stock again", "stock", "noise_ratio"),
        ("off", "stock", "overhead_ratio"),
        ("on", "stock", "overhead_ratio_on"),
        ("stock, served", "stock", "served_ratio"),
        ("parked", "stock, served", "overhead_ratio_parked"),
        ("parked, on", "stock, served", "overhead_ratio_parked_on"),
    ):
        ratios = [ours / stock for ours, stock in zip(seconds[name], seconds[baseline], strict=True)]
        spread = [bench_io.quantile(ratios, 0.1), bench_io.quantile(ratios, 0.9)]
        figures[key] = round(bench_io.median(ratios), 4)
        figures[f"{key}_p10_p90"] = [round(value, 4) for value in spread]
        step_ms = 1e3 * bench_io.median(seconds[name]) / STEPS_PER_BLOCK
        print(f"{name:<13} {step_ms:>10.3f} {baseline:>14} {figures[key]:>8.4f} {spread[0]:>8.4f} {spread[1]:>8.4f}")
    figures["stock_step_ms"] = round(1e3 * bench_io.median(seconds["stock"]) / STEPS_PER_BLOCK, 3)
    bench_io.report("scheduler_overhead", figures, flags.json)


def _filled(scheduler_cls: Any, model_dir: Path, *, in_rounds: bool, num_before: int = 0) -> SchedulerHarness:
    """A scheduler with all requests decoding, after others that longtail's has parked and stock's aborted."""
    config = scheduler_harness.make_vllm_config(
        model_dir, max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=NUM_REQUESTS * PROMPT_TOKENS
    )
    harness = SchedulerHarness(scheduler_cls, config, num_blocks=NUM_BLOCKS)
    rng = random.Random(1)
    for first in range(0, num_before, NUM_REQUESTS):
        _serve_and_stop(harness, rng, range(first, min(first + NUM_REQUESTS, num_before)))
    for i in range(NUM_REQUESTS):
        harness.add(f"r{i}", _prompt(rng), 1900, _metadata("r", i) if in_rounds else None)
    for _ in range(3):
        scheduled, _ = harness.step()
    assert len(scheduled.num_scheduled_tokens) == NUM_REQUESTS
    return harness


def _serve_and_stop(harness: SchedulerHarness, rng: random.Random, numbers: range) -> None:
    """Requests that are stopped after three steps; longtail parks them."""
    is_ours = isinstance(harness.scheduler, RolloutScheduler)
    round_id = f"parked {numbers[0]}"
    for i in numbers:
        harness.add(f"p{i}", _prompt(rng), 1900, _metadata(round_id, i) | {"park": str(i)} if is_ours else None)
    for _ in range(3):
        harness.step()
    if is_ours:
        harness.scheduler.rollout_rpc("close_round", {"round": round_id})
    else:
        harness.scheduler.finish_requests([f"p{i}" for i in numbers], RequestStatus.FINISHED_ABORTED)
    harness.run()


def _metadata(round_id: str, i: int) -> dict[str, Any]:
    return {
        "round": round_id, "target_groups": NUM_REQUESTS, "group": str(i // GROUP_SIZE),
        "group_size": GROUP_SIZE, "index": i % GROUP_SIZE,
    }  # fmt: skip


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(3, 500) for _ in range(PROMPT_TOKENS)]


def _time_block(harness: SchedulerHarness) -> float:
    """CPU seconds of `STEPS_PER_BLOCK` steps, the faked model left out."""
    total = 0
    for _ in range(STEPS_PER_BLOCK):
        start = time.thread_time_ns()
        scheduled = harness.scheduler.schedule()
        total += time.thread_time_ns() - start
        sampled = harness.fake_model(scheduled)
        start = time.thread_time_ns()
        harness.scheduler.update_from_output(scheduled, sampled)
        total += time.thread_time_ns() - start
    return total / 1e9


if __name__ == "__main__":
    main()
