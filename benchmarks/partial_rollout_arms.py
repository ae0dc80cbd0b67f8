"""The arms of `partial_rollout.py`: engines in worker processes, and the figures of their rounds.

A worker takes jobs of one JSON line: `{"arm", "begin": {"prompts", "lengths", "target_groups", "num_groups"}}` begins a
run with nothing carried, `{"arm"}` makes its next round and answers the fields of `RoundFigures`. A round begins with
a weight change, whose cost to the arm is part of it; no weights move: longtail is told a new version, stock clears its
prefix cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import bench_io
from smollm2_workers import start_longtail, start_stock

from longtail.scheduler.admission import FixedOverProvision

#: Every engine is of this size, which holds all that any arm has in flight.
MAX_NUM_SEQS, BLOCK_SIZE = 64, 32
_ENGINE = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": 1088, "block_size": BLOCK_SIZE}


@dataclass(frozen=True)
class Work:
    """What every arm is given: prompts in order, and the forced length of each member."""

    prompts: list[list[int]]
    lengths: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """One round of one arm.

    Attributes:
        cpu_s: of all threads of the engine's process.
        lengths: of the trajectories that it returned; `staleness` is how many of their tokens have which age.
        num_fresh: groups begun.
        num_sampled: tokens; `num_prefilled` went through the model besides one for each of them, prompts and tokens of
            resumed members, of which `num_reprefilled` had had KV before.

    """

    seconds: float
    cpu_s: float
    lengths: list[int]
    staleness: Counter[int]
    num_fresh: int
    num_steps: int
    num_sampled: int
    num_prefilled: int
    num_reprefilled: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the groups that it returned."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Run:
    """The same work in every arm, round by round."""

    work: Work
    rounds: dict[str, list[RoundFigures]]

    def counted(self, arm: str) -> list[RoundFigures]:
        """All but the first round."""
        return self.rounds[arm][1:]

    def speed(self, arm: str) -> float:
        """Accepted tokens a second."""
        return sum(r.num_tokens for r in self.counted(arm)) / sum(r.seconds for r in self.counted(arm))

    def cpu_speed(self, arm: str) -> float:
        """Accepted tokens a second of CPU time."""
        return sum(r.num_tokens for r in self.counted(arm)) / sum(r.cpu_s for r in self.counted(arm))

    def length_bias(self, arm: str) -> float:
        """Mean length of the returned trajectories over that of all that were begun, in all rounds."""
        returned = [length for r in self.rounds[arm] for length in r.lengths]
        num_begun = sum(r.num_fresh for r in self.rounds[arm])
        return fmean(returned) / fmean(length for row in self.work.lengths[:num_begun] for length in row)


def staleness_shares(rounds: Iterable[RoundFigures]) -> dict[int, float]:
    """Share of the accepted tokens by staleness."""
    counts = sum((r.staleness for r in rounds), Counter[int]())
    return {age: round(counts[age] / counts.total(), 4) for age in sorted(counts)}


@dataclass(frozen=True)
class Arm:
    """One way to make rounds; `carries` is false for synchronous ones. Arms may share a worker."""

    name: str
    worker: bench_io.Worker
    carries: bool = True

    def begin(self, work: Work, target_groups: int, over_provision: float) -> None:
        """Begin a run."""
        num_groups = FixedOverProvision(over_provision if self.carries else 1.0).num_groups(target_groups)
        begin = {"prompts": work.prompts, "lengths": work.lengths}
        self.worker.ask({"arm": self.name, "begin": begin | {"target_groups": target_groups, "num_groups": num_groups}})

    def run_round(self) -> RoundFigures:
        """Change the weights, then collect a round."""
        answer = self.worker.ask({"arm": self.name})
        staleness = Counter({int(age): count for age, count in answer.pop("staleness").items()})
        return RoundFigures(staleness=staleness, **answer)


def start_workers(model_dir: Path) -> list[bench_io.Worker]:
    """A longtail engine for each KV policy, and a stock engine."""
    with ThreadPoolExecutor() as pool:
        starts = [
            pool.submit(start_longtail, "longtail_partial_rounds.py", model_dir, _ENGINE, "fresh"),
            pool.submit(start_longtail, "longtail_partial_rounds.py", model_dir, _ENGINE, "stale"),
            pool.submit(start_stock, "stock_partial_rounds.py", model_dir, _ENGINE),
        ]
    return [one.result() for one in starts]
