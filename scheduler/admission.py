"""Whom to admit first, and how many groups to start: policies of a round over plain numbers.

A round has more members than the engine has slots, so the order in which groups are handed to the scheduler decides
which run first. `AdmissionPolicy` orders them; `FixedOverProvision` and `AdaptiveOverProvision` say how many groups a
round has in flight. The benchmarks' simulator uses these very classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from longtail.scheduler.errors import InvalidInputError

AdmissionName = Literal["carried_first", "nearly_complete_first", "longest_remaining_first", "fifo"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that waits to run.

    Attributes:
        serial: order in which groups were first submitted; unique.
        age_rounds: rounds since it began, or began again; 0 for a fresh group.
        num_members_left: members without an end.
        num_tokens_left: output budget that its unfinished members have left together.

    """

    serial: int
    age_rounds: int
    num_members_left: int
    num_tokens_left: int


_ORDERS: dict[str, Callable[[Candidate], tuple[int, ...]]] = {
    # Oldest tokens first: they are the next to be too stale. A restarted group is young again.
    "carried_first": lambda c: (-c.age_rounds, c.serial),
    # Fewest members to go: few half-finished groups are carried.
    "nearly_complete_first": lambda c: (c.num_members_left, -c.age_rounds, c.serial),
    # Longest job first: the least idle tail, if the budget left says how much is left.
    "longest_remaining_first": lambda c: (-c.num_tokens_left, -c.age_rounds, c.serial),
    # The order of submission, as APRIL's buffer has it.
    "fifo": lambda c: (c.serial,),
}


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """An order of groups. `carried_first`, the default, never lets a carried group wait behind a fresh one."""

    name: AdmissionName = "carried_first"

    def __post_init__(self) -> None:
        if self.name not in _ORDERS:
            raise InvalidInputError("admission", "one of " + ", ".join(_ORDERS), self.name)

    def order(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The candidates, first to admit first; the same for any order of the argument."""
        return sorted(candidates, key=_ORDERS[self.name])


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """A finished round, as far as the next one's size depends on it.

    Attributes:
        num_started: groups that were in flight or complete when it began, plus those that it added.
        num_accepted: groups that it returned; `num_filtered` were refused, `num_banked` are complete and left over.
        num_preemptions: how often a running trajectory lost its KV to the pool.
        peak_kv_usage: largest share of the pool that running requests held, 0 to 1.

    """

    num_started: int
    num_accepted: int
    num_filtered: int
    num_banked: int
    num_preemptions: int = 0
    peak_kv_usage: float = 0.0


class OverProvision(Protocol):
    """How many groups a round has in flight when it begins, complete ones from the bank included."""

    def num_groups(self, target_groups: int) -> int: ...

    def observe(self, outcome: RoundOutcome) -> None: ...


@dataclass(frozen=True, slots=True)
class FixedOverProvision:
    """`ratio` times the target, rounded up."""

    ratio: float

    def num_groups(self, target_groups: int) -> int:
        """At least the target."""
        return max(target_groups, math.ceil(self.ratio * target_groups))

    def observe(self, outcome: RoundOutcome) -> None:
        """Learns nothing."""


#: Weight of the newest round in a running mean: three rounds make 88 per cent of it.
_NEWEST = 0.5
#: A pool this full is as good as full: the next block of some request preempts another.
_FULL = 0.98
#: What a round with preemptions leaves of the bound, and what one without adds to it, as a share of the target.
_SHRINK = 0.85
_GROW = 0.125


class AdaptiveOverProvision:
    """Starts as many groups as leave `target_carried` groups unfinished, as far as the KV pool goes.

    A round that starts F groups accepts N, filters f, banks b and carries the rest: F = N + f + b + carried. So the
    next one starts N + target_carried and what is to be expected of f and b, by running means over the last rounds.
    Preemptions, or a full pool, say that F is beyond what the KV pool holds at once: the bound on F then shrinks, and
    grows again round by round (AIMD, as prime-rl's cap on its requests in flight).

    Args:
        target_carried: groups that a round should leave to the next, in the mean.

    """

    def __init__(self, target_carried: int) -> None:
        if isinstance(target_carried, bool) or not isinstance(target_carried, int) or target_carried < 0:
            raise InvalidInputError("target_carried", "an integer >= 0", target_carried)
        self.target_carried = target_carried
        self._filtered_share: float | None = None
        self._banked_share: float | None = None
        self._bound: float | None = None

    def num_groups(self, target_groups: int) -> int:
        """At least the target, whatever the pool says."""
        extra = ((self._filtered_share or 0.0) + (self._banked_share or 0.0)) * target_groups
        wanted = target_groups + self.target_carried + extra
        if self._bound is not None:
            wanted = min(wanted, self._bound)
        return max(target_groups, math.ceil(wanted - 1e-9))

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round."""
        if outcome.num_accepted == 0:
            return
        self._filtered_share = _mean(self._filtered_share, outcome.num_filtered / outcome.num_accepted)
        self._banked_share = _mean(self._banked_share, outcome.num_banked / outcome.num_accepted)
        if outcome.num_preemptions or outcome.peak_kv_usage >= _FULL:
            # Of what it really started: a bound that nothing reached says nothing.
            self._bound = _SHRINK * min(outcome.num_started, self._bound or outcome.num_started)
        elif self._bound is not None:
            self._bound += max(1.0, _GROW * outcome.num_accepted)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST) * old + _NEWEST * new
