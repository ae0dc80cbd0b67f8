"""Where the engine calls hooks, and what it expects back.

The engine knows this protocol and nothing of what hooks do; `longtail.hooks` has the implementation that recipes use.
Every call returns at once with a future, so that no hook, however slow, holds up a step. A round waits for the verdicts
that it needs, and for no other: a group that is complete but not judged yet when its round ends is judged while the
next one runs.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

import msgspec

from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Trajectory


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the hooks say of a complete group.

    Attributes:
        group: the group, as the hooks left it.
        rejected: why it must not reach the trainer, or `None` when it is accepted.

    """

    group: Group
    rejected: str | None = None


class Continue(msgspec.Struct, frozen=True, tag="continue"):
    """Decision at a boundary: sampling goes on."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Decision at a boundary: the trajectory ends here."""


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Decision at a boundary: the trajectory goes on, and `k` new branches begin here.

    Raises:
        InvalidInputError: `k` is not an integer >= 1.

    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InvalidInputError("k", "an integer >= 1", self.k)


class Append(msgspec.Struct, frozen=True, tag="append"):
    """Decision at a boundary: the environment appends these token ids, then sampling goes on.

    Raises:
        InvalidInputError: there are none, or one is not an integer >= 0.

    """

    token_ids: list[int]

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidInputError("token_ids", "at least one token", self.token_ids)
        for position, token_id in enumerate(self.token_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise InvalidInputError(f"token_ids[{position}]", "an integer >= 0", token_id)


Decision = Continue | Stop | Fork | Append


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A hook failed at a boundary in a way that filters the group."""

    reason: str


class HookPoints(Protocol):
    """The hooks of one engine, as the engine sees them. Methods may be called from any thread.

    A future raises only what is to end the round: a failure that has a defined outcome is that outcome.
    """

    def prepare(self, prompt: Prompt) -> Future[Prompt]:
        """A fresh prompt is about to be submitted; the answer is submitted instead."""

    @property
    def decides_boundaries(self) -> bool:
        """There is a hook for boundaries."""

    def decide(self, trajectory: Trajectory) -> Future[Decision | Refused]:
        """A trajectory is at a boundary, its last one."""

    def finish_trajectory(self, trajectory: Trajectory) -> Future[Trajectory]:
        """A trajectory ended by itself; the answer, with reward or loss mask, takes its place."""

    def finish_group(self, group: Group) -> Future[Verdict]:
        """All trajectories of a group ended by themselves and went through `finish_trajectory`."""

    def change_weights(self, version: int) -> Future[None]:
        """The engine has new weights."""
