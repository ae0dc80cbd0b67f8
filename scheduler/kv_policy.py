"""What becomes of a trajectory's KV when the weights change: `fresh`, `stale` or `stale_up_to:k`.

`fresh` computes it again under the new weights, so the next token is sampled from the new policy alone. `stale` keeps
it: nothing is computed again, but the token is sampled from a policy that never existed, new weights reading keys and
values of old ones. `stale_up_to:k` keeps KV that is at most `k` versions old. Of the published systems only
Megatron-LM records the staleness of KV apart from that of tokens; here it is in every trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from longtail.scheduler.errors import InvalidInputError

MAX_STALENESS = 1_000_000

_STALE_UP_TO = re.compile(r"stale_up_to:(\d{1,7})")


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """How old KV may be, in versions; `None` is without a bound, 0 is `fresh`."""

    max_staleness: int | None = 0

    @staticmethod
    def parse(text: object, field: str = "kv_policy") -> KvPolicy:
        """Read `fresh`, `stale` or `stale_up_to:k`.

        Raises:
            InvalidInputError: it is none of them.

        """
        if text == "fresh":
            return FRESH
        if text == "stale":
            return KvPolicy(None)
        if isinstance(text, str) and (match := _STALE_UP_TO.fullmatch(text)) and int(match[1]) <= MAX_STALENESS:
            return KvPolicy(int(match[1]))
        raise InvalidInputError(field, f"fresh, stale or stale_up_to:k (k from 0 to {MAX_STALENESS})", text)

    def __str__(self) -> str:
        if self.max_staleness is None:
            return "stale"
        return f"stale_up_to:{self.max_staleness}" if self.max_staleness else "fresh"

    def keeps(self, versions: Iterable[int], current: int) -> bool:
        """Whether KV of these versions is kept when the weights become `current`."""
        return self.max_staleness is None or all(abs(current - one) <= self.max_staleness for one in versions)


FRESH = KvPolicy(0)


@dataclass(slots=True)
class KvVersions:
    """Which positions of a sequence have KV of which version: runs of `(start, version)`, in order.

    Positions from the last run's start on have its version, as far as there is KV.
    """

    runs: list[tuple[int, int]]

    @property
    def all(self) -> set[int]:
        """Every version that there is."""
        return {version for _, version in self.runs}

    def extend(self, start: int, version: int) -> None:
        """KV from position `start` on is of `version` from now on; what was there before up to `start` stays."""
        while self.runs and self.runs[-1][0] >= start:
            self.runs.pop()
        if not self.runs or self.runs[-1][1] != version:
            self.runs.append((start if self.runs else 0, version))

    def upto(self, end: int) -> KvVersions:
        """The runs of the positions before `end`."""
        return KvVersions([(start, version) for start, version in self.runs if start < end])

    def spans(self, end: int) -> list[tuple[str, int, int]]:
        """Half-open `(version, start, end)` spans that cover `[0, end)`."""
        runs = self.upto(end).runs
        ends = [*(start for start, _ in runs[1:]), end]
        return [(str(version), start, stop) for (start, version), stop in zip(runs, ends, strict=False)]
