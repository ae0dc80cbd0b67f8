"""What a front end says when it forks a trajectory, and what it is told: plain data of `rollout_rpc("fork")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.limits import MAX_GROUP_SIZE, MAX_ID_CHARS

T = TypeVar("T")


class ForkOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prepare branches of one trajectory; who orders them submits them afterwards.

    Attributes:
        of: park key of the trajectory.
        keys: park keys of the branches; each finds the KV of its tokens there when it begins.
        at: output tokens that a branch has from the start. `None` is all that there are now, of one that runs.
        num_prompt_tokens: length of the trajectory's prompt.
        round: id of the scheduler's round that the branches will run in, in `group`; `None` if they do not run yet.

    """

    of: str
    keys: list[str]
    at: int | None = None
    num_prompt_tokens: int
    round: str | None = None
    group: str | None = None


class ForkPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a trajectory was forked. Tokens are counted in the trajectory's output.

    Attributes:
        is_live: it runs, or waits to run. Of any other the front end has all tokens.
        at: output tokens that the branches share with it.
        start: of a live one, output tokens that its request began with; the next three are of what came since,
            `[start, at)`, as far as there is any.
        token_ids: int.
        logprobs: float, one a token.
        versions: `(version, start, end)` of the tokens.
        segments: as in `MemberReport`.
        index: place of the first branch in the scheduler's group, where `round` was given; the others follow.
        num_kv_tokens: positions for which the branches find KV if they begin now.

    """

    is_live: bool
    at: int
    start: int = 0
    token_ids: list[int] = []
    logprobs: list[float] = []
    versions: list[tuple[str, int, int]] = []
    segments: list[tuple[int, list[tuple[str, int, int]]]] = []
    index: int = 0
    num_kv_tokens: int = 0


class GivenUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Branches that were answered and will not be submitted; `index` is that of the `ForkPoint`."""

    keys: list[str]
    round: str | None = None
    group: str | None = None
    index: int = 0


def parse_given_up(args: Mapping[str, Any]) -> GivenUp:
    """Check the arguments of `rollout_rpc("give_up_fork")`.

    Raises:
        InvalidInputError: names the field.

    """
    return _converted(args, GivenUp, "give_up_fork")


def parse_order(args: Mapping[str, Any]) -> ForkOrder:
    """Check the arguments of `rollout_rpc("fork")`.

    Raises:
        InvalidInputError: names the field.

    """
    order = _converted(args, ForkOrder, "fork")
    if not 1 <= len(order.keys) <= MAX_GROUP_SIZE:
        raise InvalidInputError("keys", f"1 to {MAX_GROUP_SIZE} branches", len(order.keys))
    if len(set(order.keys)) < len(order.keys) or order.of in order.keys:
        raise InvalidInputError("keys", "keys that nobody else has", order.keys)
    for key in order.keys:
        if not 0 < len(key) <= MAX_ID_CHARS:
            raise InvalidInputError("keys", f"1 to {MAX_ID_CHARS} characters", key)
    for name in ("at", "num_prompt_tokens"):
        if (number := getattr(order, name)) is not None and number < 0:
            raise InvalidInputError(name, "an integer >= 0", number)
    if (order.round is None) != (order.group is None):
        raise InvalidInputError("group", "a round with it, or neither", order.group)
    return order


def _converted(args: Mapping[str, Any], kind: type[T], name: str) -> T:
    try:
        return msgspec.convert(dict(args), kind)
    except msgspec.ValidationError as error:
        raise InvalidInputError(name, str(error), args) from error
