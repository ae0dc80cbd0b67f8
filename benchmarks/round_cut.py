"""How much sooner has a trainer its groups when the scheduler cuts an over-provisioned round?

Both engines hold SmolLM2-135M with the same run-time and the same options, each core in a process of its own; their
rounds alternate. Lengths are drawn beforehand from a lognormal distribution and forced, so the first N groups are the
same work in every arm:

    stock         vLLM, N groups, waits for all of them
    client cut    vLLM, over-provisioned; the client counts complete groups and aborts the rest (the best stock can do)
    longtail      over-provisioned, cut in the scheduler

Regions: a long tail (sigma 1) at over-provision 2, and where cutting loses: over-provision 1.0 (nothing to cut) and
short tails (sigma 0.1, the surplus groups only cost).

Last line: one JSON object with `time_ratio` (longtail / stock, sigma 1, over-provision 2; median over rounds),
`time_ratio_client_cut` (longtail / client cut, same), `time_ratio_no_surplus` (over-provision 1.0),
`time_ratio_short_tail` (sigma 0.1, over-provision 2) and the range of each.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_io

from longtail.engine import EngineConfig, Prompt, RolloutEngine, SamplingConfig
from longtail.engine.models import resolve_model
from longtail.engine.runtime import pick_runtime, spawn_environment

TARGET_GROUPS, GROUP_SIZE, PROMPT_TOKENS = 4, 4, 48
MEDIAN_TOKENS, MAX_TOKENS = 48, 512
VOCAB_SIZE = 49_152


@dataclass(frozen=True)
class Region:
    """One cell of the comparison."""

    key: str
    sigma: float
    over_provision: float
    client_cut: bool = False


REGIONS = (
    Region("time_ratio", sigma=1.0, over_provision=2.0, client_cut=True),
    Region("time_ratio_no_surplus", sigma=1.0, over_provision=1.0),
    Region("time_ratio_short_tail", sigma=0.1, over_provision=2.0),
)


def main() -> None:
    """Run the regions and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    num_rounds = 2 if flags.quick else 7
    regions = REGIONS[:1] if flags.quick else REGIONS
    model_dir = resolve_model("smollm2")
    config = EngineConfig(model=str(model_dir), max_num_seqs=64, max_model_len=1024, block_size=32, kv_cache_gib=1.0)
    figures: dict[str, Any] = {"num_rounds": num_rounds, "target_groups": TARGET_GROUPS, "group_size": GROUP_SIZE}
    with RolloutEngine(config) as engine, _stock_worker(model_dir, config) as stock:
        assert stock.ready["ready"]
        warm = [[8] * GROUP_SIZE] * TARGET_GROUPS
        _ours(engine, _prompts(0, len(warm)), warm, None)
        stock.ask({"prompts": _prompts(0, len(warm)), "lengths": warm, "target": None})
        print(f"{'region':<24} {'stock s':>8} {'client cut s':>13} {'longtail s':>11} {'ratio':>7} {'range':>15}")
        for region in regions:
            figures |= _measure(region, num_rounds, engine, stock.ask)
    bench_io.report("round_cut", figures, flags.json)


def _measure(region: Region, num_rounds: int, engine: RolloutEngine, ask_stock: Any) -> dict[str, Any]:
    times: dict[str, list[float]] = {"stock": [], "client cut": [], "longtail": []}
    for seed in range(num_rounds):
        num_groups = math.ceil(TARGET_GROUPS * region.over_provision)
        prompts = _prompts(seed, num_groups)
        lengths = _lengths(seed, region.sigma, num_groups)
        arms = ["stock", "longtail"] + ["client cut"] * region.client_cut
        random.Random(seed).shuffle(arms)
        for arm in arms:
            if arm == "longtail":
                seconds = _ours(engine, prompts, lengths, TARGET_GROUPS)
            else:
                count = TARGET_GROUPS if arm == "stock" else num_groups
                job = {"prompts": prompts[:count], "lengths": lengths[:count], "target": TARGET_GROUPS}
                answer = ask_stock(job)
                assert answer["num_complete"] >= TARGET_GROUPS
                seconds = answer["seconds"]
            times[arm].append(seconds)
    figures = _ratios(region.key, times["longtail"], times["stock"])
    if region.client_cut:
        figures |= _ratios(f"{region.key}_client_cut", times["longtail"], times["client cut"])
    shown = {arm: f"{bench_io.median(values):.2f}" if values else "-" for arm, values in times.items()}
    low, high = figures[f"{region.key}_range"]
    print(
        f"sigma {region.sigma:g}, over-prov. {region.over_provision:<4g} {shown['stock']:>8} {shown['client cut']:>13} "
        f"{shown['longtail']:>11} {figures[region.key]:>7.3f} {low:>7.3f}-{high:.3f}",
        flush=True,
    )
    return figures


def _ratios(key: str, ours: list[float], baseline: list[float]) -> dict[str, Any]:
    return bench_io.ratio_figures(key, [a / b for a, b in zip(ours, baseline, strict=True)])


def _ours(engine: RolloutEngine, prompts: list[list[int]], lengths: list[list[int]], target: int | None) -> float:
    start = time.perf_counter()
    got = engine.rollout(
        [Prompt(token_ids=ids, max_tokens=row) for ids, row in zip(prompts, lengths, strict=True)],
        group_size=GROUP_SIZE,
        target_groups=target,
        sampling=SamplingConfig(ignore_eos=True, seed=0),
    )
    seconds = time.perf_counter() - start
    assert got.stats.num_complete_groups >= got.target_groups
    return seconds


def _prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def _lengths(seed: int, sigma: float, num_groups: int) -> list[list[int]]:
    """Lognormal lengths with median `MEDIAN_TOKENS`, clipped to [1, `MAX_TOKENS`]."""
    rng = random.Random(1000 + seed)

    def draw() -> int:
        return max(1, min(MAX_TOKENS, round(rng.lognormvariate(math.log(MEDIAN_TOKENS), sigma))))

    return [[draw() for _ in range(GROUP_SIZE)] for _ in range(num_groups)]


def _stock_worker(model_dir: Path, config: EngineConfig) -> bench_io.Worker:
    """A stock engine with longtail's run-time settings in its environment, which is the best known for it too."""
    args = {
        "dtype": "float32", "enforce_eager": True, "max_num_seqs": config.max_num_seqs, "block_size": config.block_size,
        "max_model_len": config.max_model_len, "kv_cache_memory_bytes": int(config.kv_cache_gib * (1 << 30)),
        "logprobs_mode": "processed_logprobs", "skip_tokenizer_init": True,
    }  # fmt: skip
    script = Path(__file__).with_name("stock_rounds.py")
    extra = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    with spawn_environment(pick_runtime(config.runtime, model_dir=model_dir)):
        return bench_io.Worker([sys.executable, str(script), str(model_dir), json.dumps(args)], os.environ | extra)


if __name__ == "__main__":
    main()
