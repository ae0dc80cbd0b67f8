"""What a terminal shows of a running round, and the table at its end.

`RoundProgress` is told what happens by plain calls and redraws from inside them, at most four times a second;
it has no thread and no timer, so it costs nothing between calls and a fake clock can test it. On a terminal it
draws in place; elsewhere it prints one line every few seconds. It watches: it never stops or waits for a round.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from longtail.engine.cli.round_summary import RoundSummary, counted
from longtail.engine.trajectory import Round, Trajectory

_REDRAW_S = 0.25
_RATE_WINDOW_S = 10.0
_SAMPLE_GAP_S = 0.2
_BAR_WIDTH = 36


class RoundProgress:
    """The progress of one round at a time; `start` begins the next one.

    Use it as a context manager, so that the terminal is put back in order when a round fails.

    Args:
        console: where to draw; standard output by default.
        clock: seconds, never going back.
        line_interval_s: seconds between two lines when the console is not a terminal.

    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        line_interval_s: float = 5.0,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._line_interval_s = line_interval_s
        self._live: Live | None = None
        self._reset(0, 1, 0)

    def _reset(self, num_groups: int, group_size: int, target_groups: int) -> None:
        self._num_groups = num_groups
        self._group_size = group_size
        self._target_groups = target_groups
        self._started_s = self._drawn_s = self._clock()
        self._ended_by_group: Counter[str] = Counter()
        self._lengths: list[int] = []
        self._num_groups_done = self._num_cut = self._num_failed = 0
        self._num_tokens = self._num_running = self._num_waiting = 0
        self._samples: deque[tuple[float, int]] = deque([(self._started_s, 0)])

    def __enter__(self) -> RoundProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, num_groups: int, group_size: int, target_groups: int) -> None:
        """Begin a round of `num_groups` groups, of which `target_groups` must be complete."""
        self.close()
        self._reset(num_groups, group_size, target_groups)
        self._print_line(f"round: {num_groups} groups of {group_size}, target {target_groups} complete groups")
        if self._console.is_terminal:
            self._live = Live(
                self.render(),
                console=self._console,
                auto_refresh=False,
                # Logging handlers that are made meanwhile would keep the stand-ins that rich puts into `sys`.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)

    def on_trajectory(self, trajectory: Trajectory) -> None:
        """Count a trajectory that has its final output."""
        if trajectory.ended_by_itself:
            insort(self._lengths, len(trajectory.output_token_ids))
            self._ended_by_group[trajectory.group_id] += 1
            self._num_groups_done += self._ended_by_group[trajectory.group_id] == self._group_size
        elif trajectory.was_cut:
            self._num_cut += 1
        else:
            self._num_failed += 1
        self._draw()

    def on_tokens(self, num_output_tokens_total: int, num_running: int, num_waiting: int) -> None:
        """Take the state of the engine: output tokens since the round began, and its two queues."""
        self._num_tokens, self._num_running, self._num_waiting = num_output_tokens_total, num_running, num_waiting
        sample = (self._clock(), num_output_tokens_total)
        if len(self._samples) > 1 and sample[0] - self._samples[-2][0] < _SAMPLE_GAP_S:
            self._samples[-1] = sample
        else:
            self._samples.append(sample)
        self._draw()

    def finish(self, round: Round) -> None:
        """Take the display away and print the table of the round."""
        if self._live is not None:
            self._live.transient = True
        self.close()
        self._console.print(summary_table(round))

    def close(self) -> None:
        """Leave the display as it stands; nothing happens when there is none."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second over the last ten seconds, or since the round began."""
        now = self._clock()
        while len(self._samples) > 2 and self._samples[1][0] <= now - _RATE_WINDOW_S:
            self._samples.popleft()
        since, before = self._samples[0]
        return (self._num_tokens - before) / (now - since) if now > since else 0.0

    def render(self) -> Table:
        """The display of this moment."""
        ended = len(self._lengths)
        total = self._num_groups * self._group_size
        rows: list[tuple[str, int, int, str]] = [
            (
                "groups",
                self._num_groups_done,
                self._target_groups,
                f"{self._num_groups_done}/{self._target_groups} complete ({self._num_groups} submitted)",
            ),
            (
                "trajectories",
                ended,
                total,
                f"{ended}/{total} ended{self._others()}, {self._num_running} running, {self._num_waiting} waiting",
            ),
        ]
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, done, of, words in rows:
            bar = ProgressBar(total=max(1, of), completed=min(done, of), width=_BAR_WIDTH)
            table.add_row(Text(name, style="bold"), bar, Text(words))
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_row(Text("tokens", style="bold"), Text(f"{self._num_tokens:,} ({self.tokens_per_s:,.0f}/s)"))
        facts.add_row(Text("length", style="bold"), Text(self._length_words()))
        facts.add_row(Text("elapsed", style="bold"), Text(f"{self._clock() - self._started_s:.0f} s"))
        facts.columns[0].width = len("trajectories")
        display = Table.grid()
        display.add_row(table)
        display.add_row(facts)
        return display

    def line(self) -> str:
        """The same in one line."""
        ended = len(self._lengths)
        return (
            f"{self._clock() - self._started_s:6.1f} s  groups {self._num_groups_done}/{self._target_groups}  "
            f"trajectories {ended}/{self._num_groups * self._group_size} ended{self._others()}, "
            f"{self._num_running} running, {self._num_waiting} waiting  "
            f"{self._num_tokens:,} tokens, {self.tokens_per_s:,.0f}/s  length {self._length_words()}"
        )

    def _others(self) -> str:
        counts = ((self._num_cut, "cut"), (self._num_failed, "failed"))
        return "".join(f", {number} {word}" for number, word in counts if number)

    def _length_words(self) -> str:
        if not self._lengths:
            return "none ended yet"
        found = [self._lengths[math.ceil(q * len(self._lengths)) - 1] for q in (0.5, 0.9, 1.0)]
        return f"p50 {found[0]:,}  p90 {found[1]:,}  max {found[2]:,} (of those that ended)"

    def _draw(self) -> None:
        now = self._clock()
        if now - self._drawn_s < (self._line_interval_s if self._live is None else _REDRAW_S):
            return
        self._drawn_s = now
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
        else:
            self._print_line(self.line())

    def _print_line(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True, highlight=False)


def summary_table(round: Round) -> Table:
    """Everything that the round did and cost, three columns: what, how much, and the context."""
    summary = RoundSummary.of(round)
    stats, lengths = round.stats, summary.lengths
    table = Table(title=Text(f"Round {round.round_id}"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")

    def add(name: str, value: str, note: str = "") -> None:
        table.add_row(Text(name), Text(value), Text(note))

    add(
        "groups complete",
        f"{stats.num_complete_groups:,}",
        f"of {stats.num_submitted_groups:,} submitted, target {round.target_groups:,}",
    )
    add("groups cut", f"{stats.num_cut_groups:,}", summary.why)
    add("groups failed", f"{stats.num_failed_groups:,}", _failures(round))
    waiting = f"{summary.num_cut_waiting:,} of them before they started" if summary.num_cut_waiting else ""
    add("trajectories cut", f"{stats.num_cut_members:,}", _joined(f"of {summary.num_trajectories:,}", waiting))
    table.add_section()
    add("tokens generated", f"{stats.num_output_tokens:,}", f"{_shown(summary.tokens_per_s, ',.1f')} a second")
    add(
        "tokens kept",
        f"{stats.num_kept_tokens:,}",
        _joined(
            "in complete groups",
            f"{_shown(summary.kept_share, '.0%')} of the generated",
            f"{_shown(summary.kept_tokens_per_s, ',.1f')} a second",
        ),
    )
    add(
        "tokens recomputed",
        f"{stats.num_recomputed_tokens:,}",
        f"of {stats.num_scheduled_tokens:,} that went through the model",
    )
    table.add_section()
    add("seconds", f"{stats.seconds:,.2f}")
    add("engine steps", f"{stats.num_steps:,}")
    add(
        "batch idle",
        _shown(summary.idle_step_share, ".1%"),
        f"{stats.idle_slot_steps:,} empty slot-steps; at most {stats.peak_running:,} ran at once",
    )
    table.add_section()
    quantiles = [(name, lengths.quantile(q)) for name, q in (("p50", 0.5), ("p90", 0.9), ("max", 1.0))]
    is_bound = any(quantile is not None and quantile.is_lower_bound for _, quantile in quantiles)
    for name, quantile in quantiles:
        note = "≥: one that was stopped could have become longer" if is_bound and name == "max" else ""
        add(f"length {name}", "n/a" if quantile is None else str(quantile), note)
    return table


def _failures(round: Round) -> str:
    found = Counter(t.finish_reason for t in round.trajectories if not t.ended_by_itself and not t.was_cut)
    return ", ".join(f"{counted(number, 'member')}: {reason}" for reason, number in sorted(found.items()))


def _joined(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
