"""What a recipe writes: a hook is a plain object with any of five methods, each a plain or a coroutine function.

`on_prompt(prompt: Prompt) -> Prompt`
    A fresh prompt is about to be submitted; the answer is submitted instead. `group_id` stays.
`on_boundary(trajectory: Trajectory, boundary: Boundary) -> Decision`
    A trajectory is at a boundary that `SamplingConfig` declares, `trajectory.boundaries[-1]`, and stands still until
    the answer: `Continue()`, `Stop()`, `Fork(k)` or `Append(token_ids)`. Others go on meanwhile. Of several hooks the
    first that does not answer `Continue()` decides.
`on_trajectory(trajectory: Trajectory) -> Trajectory`
    A trajectory ended by itself. The answer may differ in `reward` (finite), `loss_mask` (a 1 may become a 0, never
    the reverse), `text` and `metadata`; everything else says what was sampled and stays.
`on_group(group: Group) -> Accept | Reject`
    All trajectories of a group ended by themselves and have been through `on_trajectory`.
`on_weights(version: int) -> None`
    The engine has new weights. Versions come one at a time, in order.

Three attributes are optional and read once, when the hook is handed over:

`time_limit_s: float`
    How long one call may take, in seconds, 60 by default. It counts from the moment the call has a thread (plain
    functions) or is handed to the event loop (coroutine functions).
`on_failure: OnFailure`
    What a call leads to that raises, is late or answers with what it may not:

    - `"reject"`, the default: the group is filtered, with a reason that names hook, method and failure; hooks that
      come later for the same trajectory or group are not called. `on_prompt` and `on_weights` have no group to
      reject, so it means `"raise"` there.
    - `"ignore"`: the value from before the call is used. In `on_group` that accepts the group, at a boundary the
      trajectory goes on.
    - `"raise"`: the round ends with a `HookError`.

    None of them makes a reward of 0 out of a reward that failed.
`name: str`
    What messages and statistics call it; its class's name by default.

A plain function runs in one of several threads, and for several items at once: state of its own needs a lock.
Coroutine functions share one event loop and must not block it: while one does, the others stand still and their
clocks run. Every hook gets a copy of the value, so changing it in place changes nothing but what the hook returns
(values inside `metadata` are shared).

A plain function cannot be killed: past its limit its answer is dropped and its thread left alone. A coroutine function
is cancelled. Neither keeps the process from ending; threads that a hook starts itself may, and `asyncio.to_thread`
does, because Python waits for those.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from longtail.engine.hook_points import Append as Append
from longtail.engine.hook_points import Continue as Continue
from longtail.engine.hook_points import Decision as Decision
from longtail.engine.hook_points import Fork as Fork
from longtail.engine.hook_points import Stop as Stop
from longtail.engine.trajectory import Group
from longtail.hooks.errors import InvalidInputError

Point = Literal["on_prompt", "on_boundary", "on_trajectory", "on_group", "on_weights"]
OnFailure = Literal["reject", "ignore", "raise"]

POINTS: tuple[Point, ...] = get_args(Point)
ON_FAILURE: tuple[OnFailure, ...] = get_args(OnFailure)

DEFAULT_TIME_LIMIT_S = 60.0
DEFAULT_ON_FAILURE: OnFailure = "reject"


class Accept(msgspec.Struct, frozen=True, tag="accept"):
    """The group goes on to the next hook, and after the last one to the trainer.

    Attributes:
        group: what takes its place, for a hook that judges members by one another: the same group and trajectories,
            changed as `on_trajectory` may change them, and in `metadata`. `None` leaves it as it is.

    """

    group: Group | None = None


class Reject(msgspec.Struct, frozen=True, tag="reject"):
    """The group is filtered: it does not reach the trainer.

    Attributes:
        reason: why, for people; not empty.

    Raises:
        InvalidInputError: there is no reason.

    """

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason:
            raise InvalidInputError("reason", "why the group is rejected", self.reason)
