"""Where a member stands in its tree: a part of its rollout metadata, and of its final report. Plain data."""

from __future__ import annotations

import msgspec

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.tree_policy import BirthReason, TreeSpec

#: Stop reason of a member that its tree had no branch for.
DISMISSED_STOP_REASON = "rollout_dismissed"


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
        seed: of the tree's decisions; so is this.
        path: the member's number in the tree, below `spec.width`. Those that are not in the group must be in `ended`
            of one of its members.
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

    def check(self, field: str) -> None:
        """Check what types do not say.

        Raises:
            InvalidInputError: names the field, which is below `field`.

        """
        width = self.spec.width
        for name, path in (("path", self.path), *((f"ended[{i}].path", one.path) for i, one in enumerate(self.ended))):
            if not 0 <= path < width:
                raise InvalidInputError(f"{field}.{name}", f"an integer in [0, {width})", path)


class BirthReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a member began as a branch; see `longtail.scheduler.tree_policy.Birth`."""

    parent: int
    at: int
    reason: BirthReason
    probability: float
