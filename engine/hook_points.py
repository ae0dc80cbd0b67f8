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


class HookPoints(Protocol):
    """The hooks of one engine, as the engine sees them. Methods may be called from any thread.

    A future raises only what is to end the round: a failure that has a defined outcome is that outcome.
    """

    def prepare(self, prompt: Prompt) -> Future[Prompt]:
        """A fresh prompt is about to be submitted; the answer is submitted instead."""

    def finish_trajectory(self, trajectory: Trajectory) -> Future[Trajectory]:
        """A trajectory ended by itself; the answer, with reward or loss mask, takes its place."""

    def finish_group(self, group: Group) -> Future[Verdict]:
        """All trajectories of a group ended by themselves and went through `finish_trajectory`."""

    def change_weights(self, version: int) -> Future[None]:
        """The engine has new weights."""
