"""The waves of one carrying round: the scheduler's rounds that its members run in, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longtail.engine.errors import InvalidInputError

if TYPE_CHECKING:
    from longtail.engine.core_link import CoreLink

#: The scheduler remembers every group of a wave until the wave ends: a stream begins another one now and then.
_MAX_WAVE_GROUPS = 4096


class Waves:
    """See the module.

    Attributes:
        ids: of all of them, the newest last.
        is_open: groups can still join the newest one: it was neither cut nor closed.

    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.is_open = False
        self._num_groups = 0

    def join(self, num_groups: int, begin: Callable[[], str]) -> None:
        """So many groups are about to run, in the newest wave if it takes more, or else in one that `begin` names."""
        if not self.is_open or self._num_groups > _MAX_WAVE_GROUPS:
            self.ids.append(begin())
            self.is_open, self._num_groups = True, 0
        self._num_groups += num_groups

    def note_cut(self, wave: str) -> None:
        """A member of `wave` was cut."""
        if wave == self.ids[-1]:
            self.is_open = False

    def close(self, link: CoreLink) -> None:
        """Stop every member that still runs."""
        for wave in self.ids:
            with contextlib.suppress(InvalidInputError):  # none of its members has arrived
                link.rpc("close_round", round=wave)

    def forget(self, link: CoreLink) -> list[dict[str, Any]]:
        """The scheduler's numbers of every wave that had a member, of which it then knows nothing more."""
        counts = []
        for wave in self.ids:
            with contextlib.suppress(InvalidInputError):
                counts.append(link.rpc("forget_round", round=wave))
        return counts
