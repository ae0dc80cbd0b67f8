"""Where a trajectory has a boundary: the end of a segment, where something may be decided before it goes on.

Tokens and lengths are looked at here; strings in the text are the scheduler's `StopStringWatch`'s to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

#: Stop reason of a member that the scheduler stopped at a boundary, for the front end to decide.
BOUNDARY_STOP_REASON = "rollout_boundary"


class BoundarySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The boundaries of one trajectory.

    Attributes:
        every: after so many tokens of a segment.
        token_ids: after one of these tokens.
        strings: after the token that completes one of these strings.
        start: output tokens before the current segment.

    """

    every: int | None = None
    token_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    start: int = 0

    def first(self, new_token_ids: Sequence[int], num_before: int) -> tuple[int, int | None] | None:
        """The first boundary in tokens that follow `num_before` others of the output, strings aside.

        Returns:
            How many of them lie before it, and the token id that made it, `None` for a length; `None` without one.

        """
        for count, token_id in enumerate(new_token_ids, start=1):
            if token_id in self.token_ids:
                return count, token_id
            if self.every is not None and num_before + count - self.start >= self.every:
                return count, None
        return None
