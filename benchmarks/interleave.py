"""What does feedback from an environment in the middle of a trajectory cost?

Every trajectory stops after each 64 tokens, 8 times, and gets an observation of 32 tokens, which takes the environment
no time. All arms hold SmolLM2-135M with the same run-time and options and get the same prompts and observations; their
runs alternate:

    append    longtail: the scheduler stops the trajectory, a hook appends, and it goes on over the same KV
    cached    stock vLLM with prefix caching: a client submits all tokens again after each segment
    uncached  the same without prefix caching

The stock client lives in the engine's process and steps the engine itself, which is the least that a client can cost;
longtail's hook is called from its own thread, through its rounds and its journal-ready books.

Regions: prompts of 48 and of 512 tokens, 8 trajectories at once; 1 trajectory at once, where nothing hides the
decision. Where longtail loses is printed last.

Last line: one JSON object with `recomputed_tokens` (tokens that had KV and went through the model again, a trajectory,
by arm), `speedup_vs_resubmit` (uncached / append, seconds) and `speedup_vs_resubmit_cached` (cached / append), medians
over repeats with their range, and the same of CPU time (`_cpu`), all of short prompts; all of it by region in
`regions`; `losses`.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import bench_io
from smollm2_workers import start_longtail, start_stock

from longtail.engine.models import resolve_model

VOCAB_SIZE = 49_152
ARMS = ("append", "cached", "uncached")
_ENGINE = {"max_num_seqs": 16, "max_model_len": 1536, "block_size": 32}


@dataclass(frozen=True)
class Region:
    """One cell of the comparison."""

    key: str
    prompt_tokens: int
    num_trajectories: int
    num_repeats: int = 2


@dataclass(frozen=True)
class Sizes:
    """Shape of a trajectory."""

    segment_tokens: int = 64
    num_observations: int = 8
    observation_tokens: int = 32


MAIN = Region("short prompts", 48, 8, num_repeats=3)
OTHER_REGIONS = (Region("long prompts", 512, 8), Region("one at once", 48, 1))


def main() -> None:
    """Run the regions and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    sizes = Sizes(16, 4, 8) if flags.quick else Sizes()
    with ExitStack() as stack:
        workers = {arm: stack.enter_context(worker) for arm, worker in _start_workers(resolve_model("smollm2")).items()}
        for worker in workers.values():
            worker.ask(_job(Region("warm-up", 48, 2), Sizes(8, 2, 4), 0))
        regions = {region.key: _measure(region, sizes, workers) for region in (MAIN, *OTHER_REGIONS)}
    losses = [
        f"{key}: {what} {figures[what]:.3f}"
        for key, figures in regions.items()
        for what in ("speedup_vs_resubmit", "speedup_vs_resubmit_cached")
        if figures[what] < 1
    ]
    print(*(f"loses: {loss}" for loss in losses), sep="\n")
    report = regions[MAIN.key] | {"regions": regions, "losses": losses, "sizes": asdict(sizes)}
    bench_io.report("interleave", report, flags.json)


def _measure(region: Region, sizes: Sizes, workers: dict[str, bench_io.Worker]) -> dict[str, Any]:
    """Alternate the arms, in random order, over fresh prompts for each repeat."""
    order = random.Random(region.key)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for repeat in range(region.num_repeats):
        for arm in order.sample(ARMS, len(ARMS)):
            runs[arm].append(workers[arm].ask(_job(region, sizes, repeat)))
    assert len({run["num_sampled"] for own in runs.values() for run in own}) == 1, "the arms did different work"

    def ratio(key: str, baseline: str) -> dict[str, Any]:
        def of(unit: str) -> list[float]:
            return [other[unit] / ours[unit] for other, ours in zip(runs[baseline], runs["append"], strict=True)]

        return bench_io.ratio_figures(key, of("seconds")) | {f"{key}_cpu": round(bench_io.median(of("cpu_s")), 3)}

    count = region.num_trajectories
    recomputed = {arm: round(fmean(run["num_recomputed"] for run in own) / count, 1) for arm, own in runs.items()}
    seconds = {arm: round(bench_io.median([run["seconds"] for run in own]), 3) for arm, own in runs.items()}
    cells = (f"{arm:>10} {seconds[arm]:7.2f} s {recomputed[arm]:7.1f} recomputed" for arm in ARMS)
    print(f"{region.key:<16}" + "".join(cells), flush=True)
    return {
        "recomputed_tokens": recomputed,
        **ratio("speedup_vs_resubmit", "uncached"),
        **ratio("speedup_vs_resubmit_cached", "cached"),
        "seconds": seconds,
    }


def _job(region: Region, sizes: Sizes, repeat: int) -> dict[str, Any]:
    rng = random.Random(f"{region.key} {repeat}")

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, VOCAB_SIZE) for _ in range(count)]

    return {
        "prompts": [tokens(region.prompt_tokens) for _ in range(region.num_trajectories)],
        "observations": [
            [tokens(sizes.observation_tokens) for _ in range(sizes.num_observations)]
            for _ in range(region.num_trajectories)
        ],
        "segment_tokens": sizes.segment_tokens,
    }


def _start_workers(model_dir: Path) -> dict[str, bench_io.Worker]:
    with ThreadPoolExecutor() as pool:
        starts = {
            "append": pool.submit(start_longtail, "longtail_interleave.py", model_dir, _ENGINE),
            "cached": pool.submit(start_stock, "stock_interleave.py", model_dir, _ENGINE, enable_prefix_caching=True),
            "uncached": pool.submit(
                start_stock, "stock_interleave.py", model_dir, _ENGINE, enable_prefix_caching=False
            ),
        }
    return {arm: one.result() for arm, one in starts.items()}


if __name__ == "__main__":
    main()
