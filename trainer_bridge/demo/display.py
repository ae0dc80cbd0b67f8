"""What a terminal shows of a training run: a row for each step, and what is being done now.

On a terminal the table is drawn in place, elsewhere each step is a line. It is told what happens, and has no thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from longtail.trainer_bridge.demo.loop import Evaluation, StepRecord

_REDRAW_S = 0.1
_BAR_WIDTH = 12
_PHASES = {"rollout": "rolling out", "train": "training", "update": "pushing the weights", "evaluate": "evaluating"}


class DemoDisplay:
    """The display of one run. Use it as a context manager.

    Args:
        console: where to draw.
        num_steps: that are to be made.
        clock: seconds, never going back.

    """

    def __init__(self, console: Console, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._num_steps = num_steps
        self._clock = clock
        self._steps: list[StepRecord] = []
        self._rewards: dict[int, float] = {}
        self._phase = "evaluate"
        self._num_ended = 0
        self._started_s = self._phase_s = self._drawn_s = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # The engine's and the libraries' log lines go elsewhere; those that come would tear the table.
            self._live = Live(self._table(), console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print(steps_table(self._steps, self._rewards))

    def on_phase(self, phase: str) -> None:
        """`rollout`, `train`, `update` or `evaluate` begins."""
        self._phase, self._phase_s, self._num_ended = phase, self._clock(), 0
        self._draw()

    def on_trajectory(self, _trajectory: object) -> None:
        """A trajectory of the round has ended."""
        self._num_ended += 1
        self._draw()

    def on_step(self, step: StepRecord) -> None:
        """A step is over."""
        self._steps.append(step)
        if self._live is None:
            self._print(step_line(step, self._num_steps))
        self._draw()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """The held-out prompts were answered."""
        self._rewards[evaluation.step] = evaluation.reward
        if self._live is None:
            self._print(f"held-out reward after step {evaluation.step}: {evaluation.reward:.3f}")
        self._draw()

    def _draw(self) -> None:
        now = self._clock()
        if self._live is not None and now - self._drawn_s >= _REDRAW_S:
            self._drawn_s = now
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        now = self._clock()
        ended = f", {self._num_ended} answers ended" if self._phase == "rollout" else ""
        step = min(len(self._steps) + 1, self._num_steps)
        words = (
            f"step {step} of {self._num_steps}: {_PHASES[self._phase]} for {now - self._phase_s:.1f} s{ended}; "
            f"{now - self._started_s:.0f} s in all"
        )
        room = max(4, self._console.size.height - 8)
        return Group(steps_table(self._steps[-room:], self._rewards), Text(words, style="bold"))

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True, highlight=False)


def step_line(step: StepRecord, num_steps: int) -> str:
    """A step in one line."""
    return (
        f"step {step.step}/{num_steps}  reward {step.reward:.3f}  length {step.mean_length:.0f} (longest "
        f"{step.max_length})  staleness {step.mean_staleness:.2f}  {step.tokens_per_s:,.0f} tokens/s  idle "
        f"{step.idle_share:.0%}  rollout {step.rollout_s:.2f} s  train {step.train_s:.2f} s  update "
        f"{step.update_s * 1e3:.0f} ms"
    )


def steps_table(steps: Sequence[StepRecord], held_out: dict[int, float]) -> Table:
    """A row for each step; `held_out` has the rewards of evaluations by step."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("reward", no_wrap=True)
    for heading in ("held out", "length", "longest", "staleness", "tokens/s", "idle", "rollout", "train", "update"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        bar = "█" * round(step.reward * _BAR_WIDTH)
        reward = held_out.get(step.step)
        table.add_row(
            str(step.step),
            Text.assemble(f"{step.reward:.3f} ", (bar, "green"), ("·" * (_BAR_WIDTH - len(bar)), "dim")),
            "" if reward is None else Text(f"{reward:.3f}", style="bold"),
            f"{step.mean_length:.0f}",
            str(step.max_length),
            f"{step.mean_staleness:.2f}",
            f"{step.tokens_per_s:,.0f}",
            f"{step.idle_share:.0%}",
            f"{step.rollout_s:.2f} s",
            f"{step.train_s:.2f} s",
            f"{step.update_s * 1e3:.0f} ms",
        )
    return table
