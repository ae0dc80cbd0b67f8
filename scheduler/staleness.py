"""Bounded staleness: how old the tokens of a group may be when a trainer gets it, and what becomes of an older one.

The staleness of a token is the current weight version minus its own (its absolute value, after a roll-back). The bound
is checked wherever a group could come nearer to a trainer: before it is resumed, when it is taken from the bank, when
it completes, and when the weights change while it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from longtail.scheduler.errors import InvalidInputError

StaleAction = Literal["mask", "restart", "drop"]

#: Tokens `[start, end)` of a trajectory have this version.
Span = tuple[int, int, int]


class GroupFate(Enum):
    """What the bound says of a group."""

    KEEP = "keep"
    """As it is, tokens beyond the bound masked where the action is `mask`."""
    RESTART = "restart"
    """Forget its tokens; it begins again from the prompt."""
    DROP = "drop"
    """It is filtered."""


def staleness(version: int, current: int) -> int:
    """In versions; see the module."""
    return abs(current - version)


@dataclass(frozen=True, slots=True)
class StalenessBound:
    """The bound and the action beyond it.

    Attributes:
        max_staleness: in versions; `None` is without a bound.
        action: `mask` tokens beyond it, `restart` or `drop` a group that has one.

    """

    max_staleness: int | None = None
    action: StaleAction = "mask"

    def __post_init__(self) -> None:
        bound = self.max_staleness
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
            raise InvalidInputError("max_staleness", "an integer >= 0", bound)
        if self.action not in ("mask", "restart", "drop"):
            raise InvalidInputError("on_stale", "one of mask, restart, drop", self.action)

    def exceeded(self, version: int, current: int) -> bool:
        """Whether a token of `version` is beyond the bound."""
        return self.max_staleness is not None and staleness(version, current) > self.max_staleness

    def fate(self, versions: Iterable[int], current: int) -> GroupFate:
        """What to do with a group whose tokens have these versions."""
        if self.action == "mask" or not any(self.exceeded(version, current) for version in versions):
            return GroupFate.KEEP
        return GroupFate.RESTART if self.action == "restart" else GroupFate.DROP

    def mask(self, loss_mask: list[int], spans: Iterable[Span], current: int) -> list[int]:
        """`loss_mask` with 0 for every token beyond the bound; the list itself when there is none."""
        masked = loss_mask
        for version, start, end in spans:
            if self.exceeded(version, current):
                if masked is loss_mask:
                    masked = list(loss_mask)
                masked[start:end] = [0] * (end - start)
        return masked

    def num_masked(self, tokens_by_staleness: Mapping[int, int]) -> int:
        """How many of these tokens are masked."""
        if self.max_staleness is None or self.action != "mask":
            return 0
        return sum(count for age, count in tokens_by_staleness.items() if age > self.max_staleness)


def histogram(spans: Iterable[Span], current: int) -> Counter[int]:
    """Number of tokens by staleness."""
    counts: Counter[int] = Counter()
    for version, start, end in spans:
        counts[staleness(version, current)] += end - start
    return counts
