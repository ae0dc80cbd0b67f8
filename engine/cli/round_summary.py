"""The figures of one round that the summary table and the report share.

Pure arithmetic over a `Round`: no drawing, no input or output. Two rules hold everywhere. The length of a
trajectory that did not end by itself is a lower bound, so a quantile that such a trajectory could still
raise is marked as one. A trajectory that never started says nothing about lengths and is left out of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from longtail.engine.trajectory import Group, Round, Trajectory

#: `kept`: ended by itself, in a complete group. `unused`: ended by itself, in a group that is not complete.
Outcome = Literal["kept", "unused", "cut", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "unused", "cut", "failed")


def has_started(trajectory: Trajectory) -> bool:
    """It was in the batch at least once."""
    return trajectory.timings.scheduled_s is not None or len(trajectory.output_token_ids) > 0


def end_words(trajectory: Trajectory) -> str:
    """Its finish reason, with the stop reason when there is one."""
    reason = trajectory.stop_reason
    return trajectory.finish_reason if reason is None else f"{trajectory.finish_reason} ({reason})"


def outcome_of(trajectory: Trajectory, group: Group) -> Outcome:
    """What became of a member of `group`."""
    if trajectory.ended_by_itself:
        return "kept" if group.complete else "unused"
    return "cut" if trajectory.was_cut else "failed"


@dataclass(frozen=True)
class Quantile:
    """A length in tokens; the true one is at least that when `is_lower_bound`."""

    value: int
    is_lower_bound: bool

    def __str__(self) -> str:
        return f"{'≥ ' if self.is_lower_bound else ''}{self.value:,}"


@dataclass(frozen=True)
class Lengths:
    """Output lengths, each list ascending. `stopped` holds the lower bounds."""

    ended: tuple[int, ...]
    stopped: tuple[int, ...]

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Lengths:
        """Sort the started ones into the two lists."""
        ended: list[int] = []
        stopped: list[int] = []
        for trajectory in trajectories:
            if has_started(trajectory):
                (ended if trajectory.ended_by_itself else stopped).append(len(trajectory.output_token_ids))
        return cls(tuple(sorted(ended)), tuple(sorted(stopped)))

    @property
    def all(self) -> list[int]:
        """Both kinds, ascending."""
        return sorted(self.ended + self.stopped)

    def quantile(self, q: float) -> Quantile | None:
        """The nearest-rank quantile, `q` in (0, 1]; exact unless a stopped trajectory could still pass it."""
        ordered = self.all
        if not ordered:
            return None
        value = ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)]
        return Quantile(value, bool(self.stopped) and self.stopped[0] <= value)

    def top_share(self, q: float) -> float | None:
        """Share of all output tokens that the longest `1 - q` of the trajectories hold (at least one)."""
        ordered = self.all
        if not sum(ordered):
            return None
        num_top = max(1, round(len(ordered) * (1 - q)))
        return sum(ordered[-num_top:]) / sum(ordered)


@dataclass(frozen=True)
class Occupancy:
    """How many trajectories ran, as a step function.

    Attributes:
        steps: `(second, running)`: from that second on so many ran. Seconds ascend; the last count is 0.
        peak: the most that ran at once.
        idle_share: empty share of `peak` places between the first start and the last end; None without a span.

    """

    steps: tuple[tuple[float, int], ...]
    peak: int
    idle_share: float | None

    @classmethod
    def of(cls, intervals: Sequence[tuple[float, float]]) -> Occupancy:
        """Count the half-open `[start, end)` intervals that cover each moment."""
        changes: Counter[float] = Counter()
        for start, end in intervals:
            changes[start] += 1
            changes[end] -= 1
        steps: list[tuple[float, int]] = []
        running = 0
        for second in sorted(changes):
            running += changes[second]
            steps.append((second, running))
        peak = max((count for _, count in steps), default=0)
        span = steps[-1][0] - steps[0][0] if steps else 0.0
        if not peak or span <= 0:
            return cls(tuple(steps), peak, None)
        busy = sum(count * (steps[i + 1][0] - second) for i, (second, count) in enumerate(steps[:-1]))
        return cls(tuple(steps), peak, max(0.0, 1 - busy / (peak * span)))


@dataclass(frozen=True)
class RoundSummary:
    """What the stats of a round do not say by themselves.

    Attributes:
        round: the round.
        outcomes: number of trajectories by outcome.
        num_never_started: stopped before their first step; part of `cut` or `failed`.
        num_cut_waiting: those of them that the cut stopped.
        num_out_of_budget: ended because they had used up `max_tokens`; part of `kept` or `unused`.
        lengths: see `Lengths`.
        occupancy: see `Occupancy`.
        cut_s: when the round was cut, in seconds since it was submitted; None when it was not, or not known.
            The last end of a cut member; without one, the end of the last complete group (it is the same step).
        end_s: when the round was over, on the same clock.

    """

    round: Round
    outcomes: dict[Outcome, int]
    num_never_started: int
    num_cut_waiting: int
    num_out_of_budget: int
    lengths: Lengths
    occupancy: Occupancy
    cut_s: float | None
    end_s: float

    @classmethod
    def of(cls, round: Round) -> RoundSummary:
        """Read everything off one round."""
        trajectories = round.trajectories
        found = Counter(outcome_of(t, group) for group in round.groups for t in group.trajectories)
        ends = [t.timings.finished_s for t in trajectories if t.timings.finished_s is not None]
        end_s = max([round.stats.seconds, *ends])
        return cls(
            round=round,
            outcomes={outcome: found[outcome] for outcome in OUTCOMES},
            num_never_started=sum(not has_started(t) for t in trajectories),
            num_cut_waiting=sum(t.was_cut and not has_started(t) for t in trajectories),
            num_out_of_budget=sum(t.finish_reason == "length" for t in trajectories),
            lengths=Lengths.of(trajectories),
            occupancy=Occupancy.of([span for t in trajectories if (span := running_span(t, end_s)) is not None]),
            cut_s=_cut_second(round),
            end_s=end_s,
        )

    @property
    def num_trajectories(self) -> int:
        """Every member of every group."""
        return sum(self.outcomes.values())

    @property
    def num_dropped_tokens(self) -> int:
        """Output tokens of groups that are not complete."""
        return self.round.stats.num_output_tokens - self.round.stats.num_kept_tokens

    @property
    def kept_share(self) -> float | None:
        """Share of the output tokens that are in complete groups."""
        stats = self.round.stats
        return stats.num_kept_tokens / stats.num_output_tokens if stats.num_output_tokens else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens of all members a second of the round."""
        stats = self.round.stats
        return stats.num_output_tokens / stats.seconds if stats.seconds > 0 else None

    @property
    def kept_tokens_per_s(self) -> float | None:
        """Output tokens of complete groups a second of the round."""
        stats = self.round.stats
        return stats.num_kept_tokens / stats.seconds if stats.seconds > 0 else None

    @property
    def idle_step_share(self) -> float | None:
        """`idle_slot_steps` as a share of peak places times steps."""
        stats = self.round.stats
        places = stats.peak_running * stats.num_steps
        return stats.idle_slot_steps / places if places else None

    @property
    def why(self) -> str:
        """Why the round ended when it did, in one phrase."""
        stats = self.round.stats
        target = counted(self.round.target_groups, "complete group")
        if stats.num_cut_groups or self.outcomes["cut"]:
            return f"the target of {target} was reached"
        if stats.num_complete_groups >= self.round.target_groups:
            return "nothing was left to cut when the target was reached"
        return f"the target of {target} could not be reached"


def counted(number: int, one: str, many: str | None = None) -> str:
    """`number` and the word for so many."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def running_span(trajectory: Trajectory, end_s: float) -> tuple[float, float] | None:
    """First start to end in seconds; None when it never started. A missing end is the round's."""
    start = trajectory.timings.scheduled_s
    if start is None:
        return None
    end = trajectory.timings.finished_s
    return start, max(start, end_s if end is None else end)


def _cut_second(round: Round) -> float | None:
    if not any(t.was_cut for t in round.trajectories):
        return None
    cut = [t.timings.finished_s for t in round.trajectories if t.was_cut]
    kept = [t.timings.finished_s for group in round.complete_groups for t in group.trajectories]
    for ends in (cut, kept):
        if known := [end for end in ends if end is not None]:
            return max(known)
    return None
