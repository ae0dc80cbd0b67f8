"""Do longtail's CPU defaults reach the throughput of hand-tuned settings?

SmolLM2-135M in float32, 32 trajectories decode at once. Each arm is a process of its own that holds an engine; the
arms take turns of a few seconds, in an order that is shuffled per round, and only one computes at a time. All of them
are started afresh for each pass: two processes with the same settings differ by several per cent for as long as they
live. Arms are longtail with its defaults, twice (their ratio is the noise), longtail with settings fixed by hand
(OpenMP library, threads, blocking time), and `stock`: vLLM in-process with nothing set, as a first user runs it.

Last line: one JSON object with `ratio_to_best` (the default's throughput / that of the best hand-tuned arm: the
smallest over these arms of the median over rounds of the ratio inside a round), `best` (that arm), `noise_ratio`,
`ratio_to_stock`, `tokens_per_s` of each arm (median) and `picked`, the line that longtail prints.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench_io

from longtail.engine.config import RuntimeConfig
from longtail.engine.cpu_machine import probe_machine
from longtail.engine.models import resolve_model

BATCH, PROMPT_TOKENS = 32, 16
_WARM_UP_TOKENS = 4
DEFAULT, AGAIN, STOCK = "defaults", "defaults again", "stock"


def main() -> None:
    """Run the arms and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    num_passes, num_rounds, num_tokens = (1, 4, 24) if flags.quick else (3, 4, 32)
    model_dir = str(resolve_model("smollm2"))
    arms = _arms(quick=flags.quick)
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    picked = ""
    rng = random.Random(0)
    for number in range(num_passes):
        print(f"pass {number + 1} of {num_passes}", flush=True)
        order = list(arms)
        with ExitStack() as stack:
            rng.shuffle(order)
            workers = {arm: stack.enter_context(_start(model_dir, arm, arms[arm])) for arm in order}
            picked = workers[DEFAULT].ready["picked"]
            for _ in range(num_rounds):
                rng.shuffle(order)
                for arm in order:
                    speeds[arm].append(workers[arm].ask(num_tokens)["tokens_per_s"])
    print(picked)
    print(f"\n{'arm':<24} {'tokens/s':>9} {'defaults/arm':>13} {'p10':>7} {'p90':>7}")
    ratios = {}
    for arm in arms:
        paired = [ours / other for ours, other in zip(speeds[DEFAULT], speeds[arm], strict=True)]
        ratios[arm] = bench_io.median(paired)
        low, high = bench_io.quantile(paired, 0.1), bench_io.quantile(paired, 0.9)
        print(f"{arm:<24} {bench_io.median(speeds[arm]):>9.1f} {ratios[arm]:>13.3f} {low:>7.3f} {high:>7.3f}")
    by_hand = [arm for arm in arms if arm not in (DEFAULT, AGAIN, STOCK)]
    best = min(by_hand, key=lambda arm: ratios[arm])
    figures: dict[str, Any] = {
        "num_rounds": num_passes * num_rounds,
        "ratio_to_best": round(ratios[best], 3),
        "best": best,
        "noise_ratio": round(ratios[AGAIN], 3),
        "ratio_to_stock": round(ratios[STOCK], 3),
        "tokens_per_s": {arm: round(bench_io.median(values), 1) for arm, values in speeds.items()},
        "picked": picked,
    }
    bench_io.report("cpu_runtime", figures, flags.json)


def _arms(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Settings of each arm: fields of `RuntimeConfig`."""
    machine = probe_machine()
    cores = machine.num_cores
    counts = sorted({1, max(1, cores - 1), cores})
    arms: dict[str, dict[str, Any]] = {DEFAULT: {}, AGAIN: {}, STOCK: {}}
    for threads in counts:
        arms[f"gnu, {threads} threads"] = {"omp_library": "gnu", "omp_threads": threads}
    if machine.intel_openmp is not None:
        settings = [(threads, 1) for threads in counts]
        if not quick:
            settings += [(cores, 0), (cores, 200)]
        for threads, block_time_ms in settings:
            arms[f"intel, {threads} threads, {block_time_ms} ms"] = {
                "omp_library": "intel", "omp_threads": threads, "block_time_ms": block_time_ms,
            }  # fmt: skip
    return arms


def _start(model_dir: str, arm: str, runtime: dict[str, Any]) -> bench_io.Worker:
    """A process that holds one engine and has generated once."""
    environ = bench_io.unset_environ()
    if arm == STOCK:
        environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, __file__, "worker", arm, model_dir, json.dumps(runtime)]
    worker = bench_io.Worker(command, environ, stderr=subprocess.DEVNULL)
    worker.ask(_WARM_UP_TOKENS)
    return worker


def _serve_longtail(model_dir: str, runtime: RuntimeConfig) -> None:
    from longtail.engine import EngineConfig, RolloutEngine, SamplingConfig
    from longtail.engine.runtime import describe, pick_runtime

    config = EngineConfig(
        model=model_dir, runtime=runtime, max_num_seqs=2 * BATCH, max_model_len=1024, kv_cache_gib=0.25
    )
    prompt = list(range(100, 100 + PROMPT_TOKENS))
    with RolloutEngine(config) as engine:
        print(json.dumps({"picked": describe(pick_runtime(runtime, model_dir=Path(model_dir)))}), flush=True)
        for line in sys.stdin:
            sampling = SamplingConfig(max_tokens=int(line), ignore_eos=True, seed=0)
            stats = engine.rollout([prompt], group_size=BATCH, sampling=sampling).stats
            print(json.dumps({"tokens_per_s": stats.num_output_tokens / stats.seconds}), flush=True)


def _serve_stock(model_dir: str) -> None:
    import time

    from vllm import LLM, SamplingParams

    llm = LLM(model_dir, dtype="float32", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=1 << 28)
    prompt = {"prompt_token_ids": list(range(100, 100 + PROMPT_TOKENS))}
    print(json.dumps({"picked": "vLLM with nothing set"}), flush=True)
    for line in sys.stdin:
        params = [SamplingParams(max_tokens=int(line), ignore_eos=True, seed=i, logprobs=0) for i in range(BATCH)]
        start = time.perf_counter()
        outputs = llm.generate([prompt] * BATCH, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"tokens_per_s": num_tokens / seconds}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] != ["worker"]:
        main()
    elif sys.argv[2] == STOCK:
        _serve_stock(sys.argv[3])
    else:
        _serve_longtail(sys.argv[3], RuntimeConfig(**json.loads(sys.argv[4])))
