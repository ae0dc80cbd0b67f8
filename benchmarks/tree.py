"""What does it cost to sample a tree of trajectories instead of independent ones?

All arms hold SmolLM2-135M with the same run-time, options and 32 batch slots, and get the same prompts; they return the
same number of leaves, whose paths have at most `depth` segments of the same length; their runs alternate:

    tree         longtail: the scheduler branches running paths, `SamplingConfig.tree`
    client       stock vLLM with prefix caching: TreePO's loop, which submits all tokens of every path again for each
                 segment and waits for all paths of all prompts at every level
    independent  stock vLLM with prefix caching: every leaf is a request of its own

The client lives in the engine's process and steps the engine itself, which is the least that a client can cost, and
takes its decisions from the same policy as longtail, in its synchronous mode.

Width 16, depth 8, segments of 32 tokens, 64 leaves, which is two for each slot. Grid: width 4, 8 and 16 by depth 4, 8
and 14 with 32 leaves, one for each slot: trees are narrow when they begin, and nothing else is there to fill the batch.
Paths do not end before their budget, so that all arms return the same number of tokens. Other regions, at width 16 and
depth 8: segments of 16 and of 128 tokens, whose resubmission costs more and less; and questions of `gsm_symbolic`,
whose answers end by themselves, so that paths that ended are branched inside (fallback); there the arms return
different tokens.

Last line: one JSON object with, at width 16, depth 8 and 64 leaves, `computed_token_saving` (1 - tokens through the
model of `tree` / those of `independent`), `speedup_vs_independent` and `speedup_vs_client` (trajectories a second,
medians over repeats with their range, and the same of CPU time, `_cpu`), `recomputed_at_forks` (tokens of all trees
that had KV and went through the model again); all cells in `cells`; where trees lose in `losses`.
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
from longtail.engine.tasks import load_task

VOCAB_SIZE = 49_152
ARMS = ("tree", "client", "independent")
_ENGINE = {"max_num_seqs": 32, "max_model_len": 1536, "block_size": 32}


@dataclass(frozen=True)
class Cell:
    """One comparison; without `task` prompts are 48 random tokens, and nothing ends early."""

    width: int
    depth: int
    segment_tokens: int = 32
    num_leaves: int = 32
    num_repeats: int = 1
    task: str | None = None

    @property
    def key(self) -> str:
        """What it is called."""
        parts = [f"width {self.width}, depth {self.depth}"]
        if self.segment_tokens != 32:
            parts.append(f"segments of {self.segment_tokens}")
        if self.num_leaves != 32:
            parts.append(f"{self.num_leaves} leaves")
        return ", ".join(parts + [self.task] * (self.task is not None))


MAIN = Cell(16, 8, num_leaves=64, num_repeats=5)
GRID = tuple(Cell(width, depth) for width in (4, 8, 16) for depth in (4, 8, 14))
OTHERS = (
    Cell(16, 8, segment_tokens=16),
    Cell(16, 8, segment_tokens=128),
    Cell(16, 8, num_leaves=64, num_repeats=3, task="gsm_symbolic"),
)
QUICK = (Cell(8, 4, segment_tokens=8, num_leaves=16), Cell(8, 4, segment_tokens=8, num_leaves=16, task="gsm_symbolic"))


def main() -> None:
    """Run the cells and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    cells = QUICK if flags.quick else (MAIN, *GRID, *OTHERS)
    model_dir = resolve_model("smollm2")
    with ExitStack() as stack:
        workers = {arm: stack.enter_context(worker) for arm, worker in _start_workers(model_dir).items()}
        for arm, worker in workers.items():
            worker.ask(_job(Cell(4, 2, 8, 8), arm, 0, model_dir))
        figures = {cell.key: _measure(cell, workers, model_dir) for cell in cells}
    losses = [
        f"{key}: {what} {of_cell[what]:.3f}"
        for key, of_cell in figures.items()
        for what in ("speedup_vs_independent", "speedup_vs_client")
        if of_cell[what] < 1
    ]
    print(*(f"loses: {loss}" for loss in losses), sep="\n")
    head = {key: value for key, value in figures[cells[0].key].items() if key != "arms"}
    head["recomputed_at_forks"] = sum(of_cell["recomputed_at_forks"] for of_cell in figures.values())
    report = head | {"cells": figures, "losses": losses, "main": asdict(cells[0])}
    bench_io.report("tree", report, flags.json)


def _measure(cell: Cell, workers: dict[str, bench_io.Worker], model_dir: Path) -> dict[str, Any]:
    """Alternate the arms, in random order, over fresh prompts for each repeat."""
    order = random.Random(cell.key)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for repeat in range(cell.num_repeats):
        for arm in order.sample(ARMS, len(ARMS)):
            runs[arm].append(workers[arm].ask(_job(cell, arm, repeat, model_dir)))
    assert all(run["num_leaves"] == cell.num_leaves for own in runs.values() for run in own)

    def ratio(key: str, baseline: str) -> dict[str, Any]:
        def of(unit: str) -> list[float]:
            return [other[unit] / ours[unit] for other, ours in zip(runs[baseline], runs["tree"], strict=True)]

        return bench_io.ratio_figures(key, of("seconds")) | {f"{key}_cpu": round(bench_io.median(of("cpu_s")), 3)}

    arms = {
        arm: {
            "seconds": round(bench_io.median([run["seconds"] for run in own]), 2),
            **{
                name: round(fmean(run[name] for run in own))
                for name in ("num_computed", "num_recomputed", "num_output_tokens")
            },
        }
        for arm, own in runs.items()
    }
    saving = 1 - arms["tree"]["num_computed"] / arms["independent"]["num_computed"]
    texts = (f"{arm} {own['seconds']:6.1f} s, {own['num_computed']:6d} computed" for arm, own in arms.items())
    print(f"{cell.key:<40}" + "; ".join(texts), flush=True)
    return {
        "computed_token_saving": round(saving, 3),
        **ratio("speedup_vs_independent", "independent"),
        **ratio("speedup_vs_client", "client"),
        "recomputed_at_forks": sum(run["num_recomputed"] for run in runs["tree"]),
        "arms": arms,
    }


def _job(cell: Cell, arm: str, repeat: int, model_dir: Path) -> dict[str, Any]:
    num_prompts = cell.num_leaves // cell.width
    if cell.task is None:
        rng = random.Random(f"{cell.key} {repeat}")
        prompts = [[rng.randrange(100, VOCAB_SIZE) for _ in range(48)] for _ in range(num_prompts)]
    else:
        prompts = _questions(cell.task, num_prompts, repeat, model_dir)
    tree = {"width": cell.width, "depth": cell.depth, "segment_tokens": cell.segment_tokens}
    # Without early ends there is nothing inside of which members could begin but paths of full length.
    fallback = {"fallback": "any"} if cell.task is None else {}
    return {
        "arm": arm, "prompts": prompts, "tree": tree | fallback, "ignore_eos": cell.task is None, "seed": repeat,
    }  # fmt: skip


def _questions(task: str, count: int, seed: int, model_dir: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = load_task(task, size=count, seed=seed)
    return [
        list(tokenizer.apply_chat_template(one.messages, add_generation_prompt=True, return_dict=False))
        for one in prompts
    ]


def _start_workers(model_dir: Path) -> dict[str, bench_io.Worker]:
    with ThreadPoolExecutor() as pool:
        starts = {
            "tree": pool.submit(start_longtail, "longtail_tree.py", model_dir, _ENGINE),
            **{
                arm: pool.submit(start_stock, "stock_tree.py", model_dir, _ENGINE, enable_prefix_caching=True)
                for arm in ("client", "independent")
            },
        }
    return {arm: one.result() for arm, one in starts.items()}


if __name__ == "__main__":
    main()
