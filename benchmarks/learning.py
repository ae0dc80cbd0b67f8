"""Does training on partial rollouts learn as well as waiting for every answer, and how much sooner?

A small model learns Euclid's algorithm (`trainer_bridge/demo/euclid_task.py`) by GRPO from rewards of 0 and 1. Its
answers have long-tailed lengths: half take at most 60 tokens, one in a hundred more than 350. An engine
(`longtail serve --bridge`) and the trainer are processes of their own and talk over the bridge. The arms differ in one
thing, and both train on the same number of complete groups a step:

    sync      over-provision 1: a round waits for all of its answers
    partial   over-provision 2: a round ends when enough groups are complete; the rest go on in the next one, with KV
              computed again under the new weights. Token-level truncated importance weights correct for the age of
              their tokens

The model is warmed up once, on demonstrations that forget three borrows in ten, and then solves about three problems
in ten. Every seed has its own order of problems and its own sampling, the same problems for both arms, and engines of
its own. Within a seed the arms' steps alternate, so that what else the machine does meets both; the arm whose turn it
is not waits. Sizes are such that, as in practice, an arm that waits for all spends most of its time generating, most
of that with a nearly empty batch: 8 groups of 8, a model of 0.4 million parameters, one update a step. Both arms have
the same settings, those at which `sync` learns smoothly.

Wall time is generation, training and the push of the weights. Every few steps both arms answer the same 256 problems,
held out from all training, sampled as in training with seeds that stay: that is the reward here, and its time is not
counted, nor are the start of the engines and the warm-up. Training rewards are no measure: partial rounds return short
answers first, and short ones are more often right.

The smoothed reward is the mean of an evaluation and its two neighbours; the first and the last stand alone. An arm's
final reward is the mean of its last three evaluations. `time_to_reward_speedup` is the wall time at which the
smoothed reward of `sync` first reaches 95 % of the way from its first to its final reward, over that at which
`partial` reaches the same reward, both with linear interpolation; the median over the seeds.

Last line: one JSON object with `time_to_reward_speedup` and its range, the same by share of the way in
`speedup_by_share` (null where a seed did not get there); `final_reward_sync` and `final_reward_partial`, each with
`mean`, `spread` (smallest and largest over the seeds) and `by_seed`; `first_reward`; `step_seconds` (mean over steps,
by arm: rollout, train, update), `idle_share`, `off_policy_share`, `tokens_per_s` by arm, `update_s` (median); `curves`
with every step and evaluation. The picture is `learning.png`, next to the JSON or in the current folder. While it runs,
what is known so far is in `PATH.partial`.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import bench_io
import learning_picture
import msgspec
import torch
from learning_curves import ARMS, Curve, figures_of, plain

from longtail.engine import SamplingConfig, Trajectory
from longtail.trainer_bridge import BridgeClient
from longtail.trainer_bridge.demo import euclid_task
from longtail.trainer_bridge.demo.engine_process import EngineProcess
from longtail.trainer_bridge.demo.euclid_model import LEARNING_RATE, MAX_MODEL_LEN, NUM_UPDATES, base_model, load_model
from longtail.trainer_bridge.demo.loop import LoopConfig, TrainingLoop
from longtail.trainer_bridge.grpo_config import GrpoConfig, TrainerConfig
from longtail.trainer_bridge.grpo_trainer import GrpoTrainer

SAMPLING = SamplingConfig(max_tokens=euclid_task.MAX_ANSWER_TOKENS)


@dataclass(frozen=True)
class Sizes:
    """Of the whole run."""

    num_seeds: int = 3
    num_steps: int = 64
    evaluate_every: int = 4
    num_evaluated: int = 256
    target_groups: int = 8
    group_size: int = 8
    warm_up_updates: int = NUM_UPDATES
    learning_rate: float = LEARNING_RATE


#: A smoke test: so little warm-up teaches nothing, and there is no reward.
QUICK = Sizes(num_seeds=1, num_steps=4, evaluate_every=2, num_evaluated=32, target_groups=4, warm_up_updates=100)


def main() -> None:
    """Run the arms with every seed and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    sizes = QUICK if flags.quick else Sizes()
    # Two threads wait for each other: where anything else runs, a step of training takes several times as long.
    torch.set_num_threads(1)
    base = _base(sizes)
    curves: list[Curve] = []

    def save() -> None:
        if flags.json is not None:
            _save(flags.json, curves)

    for seed in range(sizes.num_seeds):
        pair = [Curve(arm, seed) for arm in ARMS]
        curves += pair
        _run(pair, base, sizes, save)
    figures = figures_of(curves) | {"sizes": asdict(sizes), "curves": plain(curves)}
    picture = (flags.json or Path("learning.json")).with_name("learning.png")
    learning_picture.draw(picture, curves, figures)
    _print_figures(figures)
    bench_io.report("learning", figures, flags.json)
    if flags.json is not None:
        _partial_file(flags.json).unlink(missing_ok=True)


# ---- runs --------------------------------------------------------------------------------------------------------


def _base(sizes: Sizes) -> Path:
    start_s = time.perf_counter()

    def tell(update: int, of: int, loss: float) -> None:
        if update % 100 == 0:
            print(f"warm-up: {update}/{of} updates, loss {loss:.3f}, {time.perf_counter() - start_s:.0f} s", flush=True)

    return base_model(0, sizes.warm_up_updates, tell)


def _run(pair: list[Curve], base: Path, sizes: Sizes, save: Callable[[], None]) -> None:
    """Both arms with one seed; their steps alternate, in random order."""
    seed = pair[0].seed
    held_out = euclid_task.prompts(0, sizes.num_evaluated, held_out=True)
    order = random.Random(seed)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loops = [_start(stack, curve, base, sizes, logs) for curve in pair]
        for step in range(sizes.num_steps + 1):
            arms = order.sample(list(zip(pair, loops, strict=True)), len(pair))
            if step:
                for curve, loop in arms:
                    curve.steps.append(loop.step())
            if step % sizes.evaluate_every == 0 or step == sizes.num_steps:
                for curve, loop in arms:
                    curve.evaluations.append(msgspec.structs.replace(loop.evaluate(held_out), trajectories=[]))
                print(_line(pair), flush=True)
                save()


def _start(stack: ExitStack, curve: Curve, base: Path, sizes: Sizes, logs: Path) -> TrainingLoop:
    """An engine, a client and a trainer, until the stack is closed."""
    over_provision = ARMS[curve.arm]
    in_flight = int(sizes.target_groups * sizes.group_size * max(ARMS.values()))
    options = {
        "max-num-seqs": max(in_flight, sizes.num_evaluated), "max-model-len": MAX_MODEL_LEN, "kv-cache-gib": 0.5,
        "kv-policy": "fresh", "engine-seed": curve.seed,
    }  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    engine = stack.enter_context(
        EngineProcess(str(base), [*arguments, "--no-enable-prefix-caching"], logs / f"{curve.arm}-{curve.seed}.log")
    )
    client = stack.enter_context(BridgeClient(engine.address))
    engine.on_death(client.close)
    torch.manual_seed(curve.seed)
    settings = TrainerConfig(
        learning_rate=sizes.learning_rate, warmup_updates=6, max_grad_norm=0.2, micro_batch_tokens=8192,
        seed=curve.seed,
    )  # fmt: skip
    trainer = GrpoTrainer(load_model(base), GrpoConfig(sampling=SAMPLING), settings)
    config = LoopConfig(
        group_size=sizes.group_size, target_groups=sizes.target_groups, over_provision=over_provision,
        sampling=SAMPLING,
    )  # fmt: skip
    num_prompts = int((sizes.num_steps + 2 * max(ARMS.values())) * sizes.target_groups)
    return TrainingLoop(client, trainer, euclid_task.prompts(1 + curve.seed, num_prompts), _reward, config)


def _reward(trajectory: Trajectory) -> float:
    return euclid_task.score(trajectory.prompt_token_ids, trajectory.output_token_ids)


# ---- for people --------------------------------------------------------------------------------------------------


def _partial_file(json_path: Path) -> Path:
    return json_path.with_name(json_path.name + ".partial")


def _save(json_path: Path, curves: list[Curve]) -> None:
    json_path.parent.mkdir(parents=True, exist_ok=True)
    _partial_file(json_path).write_bytes(msgspec.json.encode({"curves": plain(curves)}))


def _line(pair: list[Curve]) -> str:
    words = [f"seed {pair[0].seed}, step {len(pair[0].steps):3}"]
    for curve in pair:
        recent = curve.steps[-4:]
        words.append(
            f"{curve.arm}: reward {curve.evaluations[-1].reward:.3f}, {curve.wall_s[-1]:6.1f} s"
            + (
                f" (a step: {fmean(s.rollout_s for s in recent):.2f} rollout, {fmean(s.train_s for s in recent):.2f}"
                f" train, {fmean(s.update_s for s in recent):.2f} update; idle"
                f" {fmean(s.idle_share for s in recent):.0%})"
                if recent
                else ""
            )
        )
    return "   ".join(words)


def _print_figures(figures: dict[str, Any]) -> None:
    print(f"\n{'':<10}{'final reward (range)':<28}{'rollout':>9}{'train':>9}{'update':>9}{'idle':>7}{'off-policy':>12}")
    for arm in ARMS:
        final, seconds = figures[f"final_reward_{arm}"], figures["step_seconds"][arm]
        low, high = final["spread"]
        cells = "".join(f"{seconds[name]:8.2f}s" for name in ("rollout", "train", "update"))
        print(
            f"{arm:<10}{final['mean']:.3f} ({low:.3f}, {high:.3f}){'':<7}{cells}{figures['idle_share'][arm]:7.0%}"
            f"{figures['off_policy_share'][arm]:12.0%}"
        )
    print(f"first reward {figures['first_reward']:.3f}; speed-up to reach a share of sync's gain, by seed:")
    for share, speedups in figures["speedup_by_share"].items():
        print(f"  {float(share):4.0%}  " + "  ".join("not reached" if x is None else f"{x:.2f}" for x in speedups))


if __name__ == "__main__":
    main()
