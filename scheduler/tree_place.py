"""Where a member stands in its tree: a part of its rollout metadata, and of its final report. Plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.tree_policy import BirthReason, TreeSpec

#: Stop reason of a member that its tree had no branch for.
DISMISSED_STOP_REASON = "rollout_dismissed"

#: Of the absolute value of a sum of log-probabilities or entropies; none of a trajectory comes near.
MAX_SUM = 1e12


class EndedPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path that ended in an earlier round, inside of which others may begin.

    Attributes:
        path: its number in the tree.
        token_ids: all of its output.
        by_itself: it ended before its budget was spent.
        sums: as in `TreePlace`.
        park: key under which its KV is parked, if it is.

    """

    path: int
    token_ids: list[int]
    by_itself: bool
    sums: list[float] = []
    park: str | None = None


class TreePlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One path of a tree. The tree begins once every member of its group in the scheduler's round has arrived.

    Attributes:
        spec: how the tree grows; every member must say the same.
        seed: of the tree's decisions; every member must say the same.
        path: the member's number in the tree, below `spec.width`. Every number is that of a member of the group, or of
            a path in `ended` of one member.
        has_begun: it was a path in an earlier round, and goes on.
        sums: of one that has begun, in a tree that does not split uniformly: at every boundary so far, the sum over all
            tokens before it of what is split by; last that over all tokens.
        ended: paths of the same tree that ended in earlier rounds.

    """

    spec: TreeSpec
    seed: int
    path: int
    has_begun: bool = False
    sums: list[float] = []
    ended: list[EndedPath] = []

    def paths(self) -> Iterator[tuple[str, int]]:
        """The numbers of all paths that it tells of, each after its field."""
        yield "path", self.path
        for index, one in enumerate(self.ended):
            yield f"ended[{index}].path", one.path

    def check(self, field: str) -> None:
        """Check what types do not say.

        Raises:
            InvalidInputError: names the field, which is below `field`.

        """
        width, seen = self.spec.width, set()
        for name, path in self.paths():
            if not 0 <= path < width:
                raise InvalidInputError(f"{field}.{name}", f"an integer in [0, {width})", path)
            if path in seen:
                raise InvalidInputError(f"{field}.{name}", "a path of which nothing else is said", path)
            seen.add(path)
        for name, sums in (("sums", self.sums), *((f"ended[{i}].sums", one.sums) for i, one in enumerate(self.ended))):
            if not all(math.isfinite(one) and abs(one) <= MAX_SUM for one in sums):
                raise InvalidInputError(f"{field}.{name}", f"finite numbers up to {MAX_SUM:g}", sums)


class BirthReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a member began as a branch; see `longtail.scheduler.tree_policy.Birth`."""

    parent: int
    at: int
    reason: BirthReason
    probability: float
