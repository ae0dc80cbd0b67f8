"""The scenario of `simulate_rounds.py`, and its cells: one simulated fleet each, over several seeds.

The step-time model is arithmetic over a data sheet, not a measurement: a dense 7.6 B model (28 layers, 4 KV heads of
128) in bfloat16, an engine on one H100.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import bench_io
import numpy as np
from round_simulator import FleetConfig, RoundReport, RoundSimulator, StepModel

from longtail.scheduler.admission import AdaptiveOverProvision, FixedOverProvision, OverProvision
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.staleness import StaleAction, StalenessBound

# 15.2 GB of weights and 57,344 B of KV a token over 3.35 TB/s; 15.2 GFLOP a token at 45 per cent of 989 TFLOP/s.
# 1.5 ms a step and 20 us a member are a guess at everything else.
STEP = StepModel(a_s=6e-3, b_s=2e-5, c_s=17e-9, prefill_s_per_token=34e-6)
KV_CAPACITY_TOKENS = 955_000  # 90 per cent of 80 GB, less the weights and 2 GB
MAX_NUM_SEQS, GROUP_SIZE, GROUPS_PER_ENGINE, PROMPT_TOKENS = 256, 8, 16, 512
MEDIAN_TOKENS, MAX_TOKENS, BLOCK_SIZE = 2000, 16_384, 16
#: 45.6 GFLOP an accepted token, on the same GPUs at the same 45 per cent.
TRAIN_S_PER_TOKEN = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of the sweep.

    Attributes:
        ratio: fixed over-provision; 1 is synchronous.
        adaptive: if set, adaptive over-provision instead, that leaves this many times N groups carried.

    """

    ratio: float = 1.0
    adaptive: float | None = None
    sigma: float = 1.0
    kv: str = "fresh"
    groups_per_engine: int = GROUPS_PER_ENGINE
    num_engines: int = 8
    max_staleness: int | None = None
    action: StaleAction = "mask"
    correlation: float = 0.0

    @property
    def synchronous(self) -> Cell:
        """Its baseline, where nothing is carried, so that neither KV policy nor bound matter."""
        return replace(self, ratio=1.0, adaptive=None, kv="fresh", max_staleness=None, action="mask")

    @property
    def is_synchronous(self) -> bool:
        """It starts no more groups than it needs."""
        return self.ratio == 1.0 and self.adaptive is None

    def simulator(self, step: StepModel, seed: int) -> RoundSimulator:
        """Its fleet before the first round."""
        target = self.groups_per_engine * self.num_engines
        config = FleetConfig(
            step=step,
            num_engines=self.num_engines,
            max_num_seqs=MAX_NUM_SEQS,
            target_groups=target,
            prompt_tokens=PROMPT_TOKENS,
            max_tokens=MAX_TOKENS,
            kv_policy=KvPolicy.parse(self.kv),
            bound=StalenessBound(self.max_staleness, self.action),
            block_size=BLOCK_SIZE,
            kv_capacity_tokens=KV_CAPACITY_TOKENS,
        )
        over: OverProvision = FixedOverProvision(self.ratio)
        if self.adaptive is not None:
            over = AdaptiveOverProvision(round(self.adaptive * target))
        lengths = lognormal_lengths(
            seed, median=MEDIAN_TOKENS, sigma=self.sigma, max_tokens=MAX_TOKENS, group_size=GROUP_SIZE,
            correlation=self.correlation,
        )  # fmt: skip
        return RoundSimulator(config, lengths, over)


class Sweep:
    """Cells and their figures: medians over seeds of `measure`, and gains over the synchronous cell, seed by seed."""

    def __init__(self, step: StepModel, *, num_seeds: int, warm_up: int, num_rounds: int) -> None:
        self._step = step
        self._num_seeds = num_seeds
        self._warm_up = warm_up
        self._num_rounds = num_rounds
        self._runs: dict[Cell, list[dict[str, Any]]] = {}

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell; each cell is simulated only once."""
        baseline = self._simulate(cell.synchronous)
        runs = baseline if cell.is_synchronous else self._simulate(cell)
        figures = {key: _middle([run[key] for run in runs]) for key in runs[0]}
        for gain, ours, theirs in (
            ("gain", "tokens_per_s", "tokens_per_s"),
            ("gain_with_training", "tokens_per_s_with_training", "tokens_per_s_with_training"),
            ("trained_gain", "trained_tokens_per_s", "tokens_per_s"),
        ):
            gains = [run[ours] / base[theirs] for run, base in zip(runs, baseline, strict=True)]
            figures |= {gain: bench_io.median(gains), f"{gain}_range": [min(gains), max(gains)]}
        return figures

    def cells(self) -> list[dict[str, Any]]:
        """All cells so far, as plain values."""
        return [asdict(cell) | rounded(self(cell)) for cell in list(self._runs)]

    def _simulate(self, cell: Cell) -> list[dict[str, Any]]:
        if cell not in self._runs:
            self._runs[cell] = [self._run(cell, seed) for seed in range(self._num_seeds)]
        return self._runs[cell]

    def _run(self, cell: Cell, seed: int) -> dict[str, Any]:
        # The rounds of a large fleet differ little, and a synchronous one has no transient.
        is_large = cell.num_engines >= 256
        warm_up = 0 if cell.is_synchronous else self._warm_up
        num_rounds = 2 if is_large else self._num_rounds
        simulator = cell.simulator(self._step, seed)
        return measure(simulator, [simulator.run_round() for _ in range(warm_up + num_rounds)], warm_up)


def measure(simulator: RoundSimulator, reports: Sequence[RoundReport], warm_up: int) -> dict[str, Any]:
    """The figures of a run, over the rounds after the first `warm_up`; throughput is per engine."""
    config, counted = simulator.config, reports[warm_up:]

    def total(name: str) -> Any:
        return sum(getattr(report, name) for report in counted)

    seconds, tokens = total("seconds"), total("accepted_tokens")
    num_groups = sum(len(report.accepted) for report in counted)
    trained = sum(sum(report.trained.values()) for report in counted)
    ages: Counter[int] = sum((report.staleness for report in counted), Counter())
    per_engine = tokens / seconds / config.num_engines
    mean_drawn = simulator.drawn_tokens / simulator.num_drawn
    target_groups = len(counted) * config.target_groups
    return {
        "tokens_per_s": per_engine,
        "tokens_per_s_with_training": 1 / (1 / per_engine + TRAIN_S_PER_TOKEN),
        "trained_tokens_per_s": trained / seconds / config.num_engines,
        "round_s": seconds / len(counted),
        "idle_share": 1 - total("slot_s") / total("peak_slot_s"),
        "started_ratio": total("num_started") / target_groups,
        "carried_ratio": total("num_carried") / target_groups,
        "banked_ratio": total("num_banked") / target_groups,
        "off_policy_share": 1 - ages[0] / tokens,
        "mean_staleness": sum(age * count for age, count in ages.items()) / tokens,
        "staleness_share": {age: ages[age] / tokens for age in sorted(ages)},
        "masked_group_share": total("num_masked_groups") / num_groups,
        "restarted_per_group": total("num_restarted") / num_groups,
        "dropped_per_group": total("num_dropped") / num_groups,
        "lost_per_generated_token": total("lost_tokens") / total("generated_tokens"),
        "reprefilled_per_token": total("reprefill_tokens") / tokens,
        "length_excess": tokens / total("accepted_trajectories") / mean_drawn - 1,
        "length_excess_by_round": [r.accepted_tokens / r.accepted_trajectories / mean_drawn - 1 for r in reports[:12]],
        "peak_kv_usage": max(report.peak_kv_tokens for report in counted) / KV_CAPACITY_TOKENS,
    }


def lognormal_lengths(
    seed: int, *, median: float, sigma: float, max_tokens: int, group_size: int, correlation: float = 0.0
) -> Iterator[list[int]]:
    """Endless groups of lognormal lengths, clipped to `[1, max_tokens]`.

    `correlation` is the share of the variance of a length's logarithm that the members of a group have in common (a
    hard prompt makes all of them long); whatever it is, the lengths of all trajectories have the same distribution.
    """
    rng = np.random.default_rng(seed)
    common, own = sigma * math.sqrt(correlation), sigma * math.sqrt(1 - correlation)
    while True:
        normal = own * rng.standard_normal((4096, group_size)) + common * rng.standard_normal((4096, 1))
        yield from np.clip(np.rint(median * np.exp(normal)), 1, max_tokens).astype(int).tolist()


def _middle(values: list[Any]) -> Any:
    """The median; of lists item by item, of shares by key their mean, so that they add up."""
    if isinstance(values[0], dict):
        keys = sorted(set().union(*values))
        return {key: sum(value.get(key, 0.0) for value in values) / len(values) for key in keys}
    if isinstance(values[0], list):
        return [bench_io.median(list(items)) for items in zip(*values, strict=True)]
    return bench_io.median(values)


def rounded(value: Any) -> Any:
    """Floats to four digits that count, in whatever holds them."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
