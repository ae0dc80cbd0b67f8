"""How much sooner has a trainer its groups when the scheduler carries unfinished ones over to the next round?

Active partial rollouts: a round starts more groups than it needs, ends when enough are complete, and the rest go on
in the next one. All arms hold SmolLM2-135M with the same run-time and options and get the same prompts in the same
order, and for each member the same forced length, lognormal or that of a real run; the weight version changes before
every round. Their rounds alternate:

    sync      stock vLLM, synchronous: N groups, waits for all of them
    client    active partial rollouts by a client of stock vLLM, in the engine's process: abort, submit token ids again
    fresh     longtail, KV of carried trajectories computed again after a weight change, as client does
    stale     longtail, KV of carried trajectories kept

A speed is accepted tokens a second: tokens of the returned groups over the seconds of the rounds, weight change
included, training left out. Every run begins with nothing carried; its first round is not counted in any arm, and what
is carried at its end counts as work and not as tokens. Prompts are so many that none runs out of them.

Like is compared with like in fresh / client, which do the same work. A client that lets stock vLLM keep its KV, by
`pause(mode="keep", clear_cache=False)`, is not measured.

Regions: sigma 0.5, 1 and 1.5 at over-provision 2; over-provision 1.5 and 4; long prompts, where computing KV again
costs most; the lengths of a real task. Where longtail loses is printed last.

Last line: one JSON object with `speedup_vs_sync` (fresh / sync) and `speedup_vs_client_side` (stale / client), median
over seeds, at sigma 1 and over-provision 2, the range of each, and the same of CPU time (`_cpu`), which other work on
the machine disturbs less; the same in `by_sigma` and, for the other regions, in `regions`, there with all that follows;
`tokens_per_s`, `reprefilled_tokens` a round, `staleness` (share of accepted tokens by age in versions),
`off_policy_share`, `length_bias` (mean length of returned over that of begun trajectories) and `where_time_goes`
(seconds for 1,000 accepted tokens by the step model: steps, members, prefill, the rest) by arm at sigma 1;
`step_model` and `simulation`, by which `simulate_rounds.py` is validated; `losses`.
"""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import bench_io
from partial_rollout_arms import BLOCK_SIZE, MAX_NUM_SEQS, Arm, RoundFigures, Run, Work, staleness_shares, start_workers
from round_simulator import StepModel, fit_step_model

from longtail.engine.models import resolve_model
from longtail.engine.tasks import load_task

TARGET_GROUPS, GROUP_SIZE = 4, 4
VOCAB_SIZE = 49_152
REAL_TASK, NUM_REAL_GROUPS = "chain_sum", 32
#: Each with processes of its own, because two processes with the same settings differ by several per cent; the other
#: regions are spread over them.
NUM_SEEDS = 3
ARMS = ("sync", "client", "fresh", "stale")


@dataclass(frozen=True)
class Sizes:
    """`num_rounds` of a run, the first not counted; lengths have this median and are cut off at `max_tokens`."""

    num_rounds: int
    median_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Region:
    """One cell of the comparison; without a sigma the lengths are those of a real run."""

    key: str
    sigma: float | None
    over_provision: float = 2.0
    prompt_tokens: int = 48


MAIN = Region("sigma 1", 1.0)
OTHER_REGIONS = (
    Region("sigma 0.5", 0.5),
    Region("sigma 1.5", 1.5),
    Region("over-provision 1.5", 1.0, over_provision=1.5),
    Region("over-provision 4", 1.0, over_provision=4.0),
    Region("long prompts", 1.0, prompt_tokens=512),
    Region("real lengths", None),
)


def main() -> None:
    """Run the regions and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    sizes = Sizes(3, 16, 64) if flags.quick else Sizes(6, 32, 256)
    model_dir = resolve_model("smollm2")
    num_seeds = 1 if flags.quick else NUM_SEEDS
    measured: dict[str, list[Run]] = {region.key: [] for region in (MAIN, *OTHER_REGIONS)}
    samples = []
    for seed in range(num_seeds):
        with ExitStack() as stack:
            fresh, stale, stock = (stack.enter_context(worker) for worker in start_workers(model_dir))
            arms = [Arm("sync", stock, carries=False), Arm("client", stock), Arm("fresh", fresh), Arm("stale", stale)]
            for arm in arms:
                _warm_up(arm)
            samples.append(_step_times(fresh, seed))
            print(_HEADING if seed == 0 else "", flush=True)
            for region in (MAIN, *(() if flags.quick else OTHER_REGIONS[seed::num_seeds])):
                work = (
                    _lognormal_work(region, region.sigma, sizes, seed)
                    if region.sigma is not None
                    else _real_work(fresh, model_dir, sizes)
                )
                measured[region.key].append(_measure(region, work, sizes.num_rounds, seed, arms))
    step_model = _fit(samples)
    figures = {key: _figures(runs, step_model) for key, runs in measured.items() if runs}
    headline = figures[MAIN.key]
    _print_costs(headline["where_time_goes"], step_model)
    losses = _losses(figures)
    print(*(f"loses: {loss}" for loss in losses), sep="\n")
    by_sigma = {key.removeprefix("sigma "): own for key, own in figures.items() if key.startswith("sigma")}
    report = headline | {
        "by_sigma": {sigma: {k: v for k, v in f.items() if k.startswith("speedup")} for sigma, f in by_sigma.items()},
        "regions": {key: f for key, f in figures.items() if key != MAIN.key},
        "losses": losses,
        "sizes": asdict(sizes) | {"target_groups": TARGET_GROUPS, "group_size": GROUP_SIZE},
        "step_model": asdict(step_model),
        "simulation": _simulation(measured[MAIN.key][0], MAIN.over_provision, step_model),
    }
    bench_io.report("partial_rollout", report, flags.json)


# ---- runs --------------------------------------------------------------------------------------------------------


def _warm_up(arm: Arm) -> None:
    arm.begin(Work(_prompts("warm-up", TARGET_GROUPS, 48), [[8] * GROUP_SIZE] * TARGET_GROUPS), TARGET_GROUPS, 1.0)
    arm.run_round()


def _step_times(worker: bench_io.Worker, seed: int) -> dict[str, list[float]]:
    return worker.ask({"calibrate": {"seed": seed, "vocab_size": VOCAB_SIZE}})


def _measure(region: Region, work: Work, num_rounds: int, seed: int, arms: list[Arm]) -> Run:
    """One run of every arm, their rounds in random order."""
    run = Run(work, {arm.name: [] for arm in arms})
    for arm in arms:
        arm.begin(run.work, TARGET_GROUPS, region.over_provision)
    order = random.Random(f"{region.key} {seed}")
    for _ in range(num_rounds):
        for arm in order.sample(arms, len(arms)):
            run.rounds[arm.name].append(arm.run_round())
    _print_run(region.key, run)
    return run


def _lognormal_work(region: Region, sigma: float, sizes: Sizes, seed: int) -> Work:
    """Prompts and lengths, enough for a run of any arm."""
    num_groups = TARGET_GROUPS * (sizes.num_rounds + math.ceil(region.over_provision))
    rng = random.Random(f"{sigma} {seed}")
    mu = math.log(sizes.median_tokens)

    def draw() -> int:
        return max(1, min(sizes.max_tokens, round(rng.lognormvariate(mu, sigma))))

    lengths = [[draw() for _ in range(GROUP_SIZE)] for _ in range(num_groups)]
    return Work(_prompts(f"{region.key} {seed}", num_groups, region.prompt_tokens), lengths)


def _prompts(seed: str, count: int, num_tokens: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]


def _real_work(worker: bench_io.Worker, model_dir: Path, sizes: Sizes) -> Work:
    """Prompts of a task with the lengths of the answers that the model gives to them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chats = [prompt.messages for prompt in load_task(REAL_TASK, NUM_REAL_GROUPS, 0)]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    job = {"prompts": prompts, "group_size": GROUP_SIZE, "max_tokens": sizes.max_tokens}
    lengths = worker.ask({"answer": job | {"stop_token_id": tokenizer.eos_token_id}})["lengths"]
    flat = [float(length) for row in lengths for length in row]
    print(f"{REAL_TASK}: {len(flat)} answers, median {bench_io.median(flat):g} tokens, 90 % below "
          f"{bench_io.quantile(flat, 0.9):g}, {sum(x == sizes.max_tokens for x in flat)} cut off")  # fmt: skip
    return Work(prompts, lengths)


# ---- figures -----------------------------------------------------------------------------------------------------


def _figures(runs: list[Run], step: StepModel) -> dict[str, Any]:
    """What the docstring names, of one region."""

    def ratio(key: str, ours: str, baseline: str) -> dict[str, Any]:
        cpu = [run.cpu_speed(ours) / run.cpu_speed(baseline) for run in runs]
        wall = bench_io.ratio_figures(key, [run.speed(ours) / run.speed(baseline) for run in runs])
        return wall | {f"{key}_cpu": round(bench_io.median(cpu), 3)}

    counted = {arm: [r for run in runs for r in run.counted(arm)] for arm in ARMS}
    ages = {arm: staleness_shares(rounds) for arm, rounds in counted.items()}
    return {
        **ratio("speedup_vs_sync", "fresh", "sync"),
        **ratio("speedup_vs_client_side", "stale", "client"),
        **ratio("speedup_vs_sync_stale", "stale", "sync"),
        **ratio("speedup_vs_sync_client", "client", "sync"),
        **ratio("speedup_vs_client_side_fresh", "fresh", "client"),
        "num_seeds": len(runs),
        "tokens_per_s": {arm: round(bench_io.median([run.speed(arm) for run in runs]), 2) for arm in ARMS},
        "reprefilled_tokens": {arm: round(fmean(r.num_reprefilled for r in counted[arm]), 1) for arm in ARMS},
        "staleness": ages,
        "off_policy_share": {arm: round(1 - shares.get(0, 0.0), 4) for arm, shares in ages.items()},
        "length_bias": {arm: round(fmean(run.length_bias(arm) for run in runs), 4) for arm in ARMS},
        "where_time_goes": {arm: _costs(rounds, step) for arm, rounds in counted.items()},
    }


def _fit(samples: list[dict[str, list[float]]]) -> StepModel:
    """The step-time model, of the median over repeats of each sample."""
    seconds = [bench_io.median(list(repeats)) for repeats in zip(*(one["seconds"] for one in samples), strict=True)]
    return fit_step_model(**samples[0] | {"seconds": seconds})


def _costs(rounds: list[RoundFigures], step: StepModel) -> dict[str, float]:
    """Seconds for 1,000 accepted tokens. The rest is attention over long contexts, the front end, and an error."""
    thousands = sum(r.num_tokens for r in rounds) / 1000
    seconds = sum(r.seconds for r in rounds)
    parts = {
        "steps": step.a_s * sum(r.num_steps for r in rounds),
        "members": step.b_s * sum(r.num_sampled for r in rounds),
        "prefill": step.prefill_s_per_token * sum(r.num_prefilled for r in rounds),
    }
    parts["rest"] = seconds - sum(parts.values())
    return {name: round(value / thousands, 2) for name, value in parts.items()}


def _losses(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Regions in which longtail is slower than a baseline."""
    pairs = {
        "speedup_vs_sync": "fresh is slower than sync", "speedup_vs_sync_stale": "stale is slower than sync",
        "speedup_vs_client_side": "stale is slower than client",
        "speedup_vs_client_side_fresh": "fresh is slower than client",
    }  # fmt: skip
    return [
        f"{region}: {what}, {own[key]:.3f}" for region, own in figures.items() for key, what in pairs.items()
        if own[key] < 1
    ]  # fmt: skip


def _simulation(run: Run, over_provision: float, step: StepModel) -> dict[str, Any]:
    """What `round_simulator.validate` needs to make the rounds of `fresh` again, the first one too."""
    rounds = [[r.num_tokens, round(r.seconds, 4)] for r in run.rounds["fresh"]]
    return {
        "step_model": asdict(step),
        "config": {
            "num_engines": 1,
            "max_num_seqs": MAX_NUM_SEQS,
            "target_groups": TARGET_GROUPS,
            "group_size": GROUP_SIZE,
            "over_provision": over_provision,
            "kv_policy": "fresh",
            "prompt_tokens": len(run.work.prompts[0]),
            "block_size": BLOCK_SIZE,
        },
        "lengths": run.work.lengths,
        "rounds": rounds,
        "measured_tokens_per_s": round(sum(tokens for tokens, _ in rounds) / sum(seconds for _, seconds in rounds), 3),
    }


# ---- for people --------------------------------------------------------------------------------------------------

_HEADING = (
    f"\n{'':<20}{'tokens a second':^31}{'speed-up':^32}{'re-prefilled a round':^24}{'off-policy':^21}"
    f"{'length bias':^21}\n"
    f"{'region':<20}" + "".join(f"{arm:>7}" for arm in ARMS) + "   " + "".join(
        f"{pair:>8}" for pair in ("f/sync", "s/sync", "f/client", "s/client")
    ) + "".join(f"{arm:>8}" for arm in ARMS[1:]) + "".join(f"{arm:>7}" for arm in ARMS[1:]) * 2
)  # fmt: skip


def _print_run(key: str, run: Run) -> None:
    speed = {arm: run.speed(arm) for arm in ARMS}
    pairs = (("fresh", "sync"), ("stale", "sync"), ("fresh", "client"), ("stale", "client"))
    cells = [f"{speed[arm]:7.1f}" for arm in ARMS] + ["   "]
    cells += [f"{speed[ours] / speed[baseline]:8.2f}" for ours, baseline in pairs]
    cells += [f"{fmean(r.num_reprefilled for r in run.counted(arm)):8.0f}" for arm in ARMS[1:]]
    cells += [f"{1 - staleness_shares(run.counted(arm)).get(0, 0.0):7.0%}" for arm in ARMS[1:]]
    cells += [f"{run.length_bias(arm):7.3f}" for arm in ARMS[1:]]
    print(f"{key:<20}" + "".join(cells), flush=True)


def _print_costs(costs: dict[str, dict[str, float]], step: StepModel) -> None:
    model = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in asdict(step).items())
    print(f"\nwhere the seconds for 1,000 accepted tokens go, {MAIN.key} ({model})")
    for arm, parts in costs.items():
        total = sum(parts.values())
        print(f"{arm:<8}{total:7.1f} = " + " + ".join(f"{value:.1f} {name}" for name, value in parts.items()))


if __name__ == "__main__":
    main()
