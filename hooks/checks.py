"""What a hook is handed, and what it may answer.

A hook gets a copy with lists of its own, and of its answer only the fields that it may change are taken over. What
was sampled can therefore not change, neither by mistake nor by a hook that goes on after its time limit.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from longtail.engine.hook_points import Decision, Verdict
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Trajectory
from longtail.hooks.errors import shown
from longtail.hooks.protocol import Accept, Reject

#: A field that is not named here is checked to be as it was, one that the engine adds later included.
CHANGEABLE_FIELDS = ("reward", "loss_mask", "text", "metadata")

_encoder = msgspec.msgpack.Encoder()

_FIXED_FIELDS = tuple(name for name in Trajectory.__struct_fields__ if name not in CHANGEABLE_FIELDS)


class WrongAnswer(Exception):
    """What is wrong with a hook's answer, in words that follow its name."""


def described(value: object) -> str:
    """Type and value, for a message about an answer of the wrong type."""
    return "None" if value is None else f"{type(value).__name__} {shown(value)}"


def plain_scalar(value: object) -> object:
    """The Python number or bool in a NumPy or torch scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def checked_reward(value: object, what: str) -> float:
    """`value` as a float; bools are 0 and 1.

    Raises:
        WrongAnswer: it is not a finite number; the message is `what` with the value.

    """
    number = plain_scalar(value)
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        if inspect.iscoroutine(value):
            value.close()
        raise WrongAnswer(f"{what} {described(value)}, expected a finite number")
    return float(number)


# ---- copies ------------------------------------------------------------------------------------------------------


def copied_prompt(prompt: Prompt) -> Prompt:
    """The prompt with lists and metadata of its own. It is not checked yet and may hold anything."""
    changes: dict[str, Any] = {}
    if isinstance(prompt.token_ids, list):
        changes["token_ids"] = prompt.token_ids.copy()
    if isinstance(prompt.messages, list):
        changes["messages"] = [dict(one) if isinstance(one, Mapping) else one for one in prompt.messages]
    if isinstance(prompt.metadata, Mapping):
        changes["metadata"] = dict(prompt.metadata)
    return replace(prompt, **changes)


def copied_trajectory(trajectory: Trajectory) -> Trajectory:
    """The trajectory with lists and metadata of its own."""
    changes: dict[str, Any] = {
        name: value.copy()
        for name in Trajectory.__struct_fields__
        if isinstance(value := getattr(trajectory, name), (list, dict))
    }
    changes["segments"] = [
        msgspec.structs.replace(segment, kv_versions=segment.kv_versions.copy()) for segment in trajectory.segments
    ]
    return msgspec.structs.replace(trajectory, **changes)


def copied_group(group: Group) -> Group:
    """The group with trajectories and metadata of its own."""
    return msgspec.structs.replace(
        group, trajectories=[copied_trajectory(one) for one in group.trajectories], metadata=group.metadata.copy()
    )


# ---- answers -----------------------------------------------------------------------------------------------------


def checked_prompt(before: Prompt, answer: object) -> Prompt:
    """What `on_prompt` made of `before`. Its content is the engine's to check.

    Raises:
        WrongAnswer: it is no `Prompt`, or one of another group.

    """
    if not isinstance(answer, Prompt):
        raise WrongAnswer(f"returned {described(answer)}, expected a Prompt")
    if answer.group_id != before.group_id:
        raise WrongAnswer(f"changed group_id from {shown(before.group_id)} to {shown(answer.group_id)}")
    return answer


def checked_trajectory(before: Trajectory, answer: object) -> Trajectory:
    """`before` with what `on_trajectory` may change.

    Raises:
        WrongAnswer: it is no `Trajectory`, differs in what it may not, unmasks a token or has a bad reward.

    """
    if not isinstance(answer, Trajectory):
        raise WrongAnswer(f"returned {described(answer)}, expected a Trajectory")
    for name in _FIXED_FIELDS:
        was, now = getattr(before, name), getattr(answer, name)
        if type(now) is not type(was) or now != was:
            raise WrongAnswer(f"changed {name} from {shown(was)} to {shown(now)}, which a hook may not")
    if answer.text is not None and not isinstance(answer.text, str):
        raise WrongAnswer(f"set text to {described(answer.text)}, expected a string or None")
    return msgspec.structs.replace(
        before,
        reward=None if answer.reward is None else checked_reward(answer.reward, "set reward to"),
        loss_mask=_checked_loss_mask(before.loss_mask, answer.loss_mask),
        text=answer.text,
        metadata=_checked_metadata(answer.metadata),
    )


def _checked_metadata(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WrongAnswer(f"set metadata to {described(value)}, expected a dict with strings for keys")
    try:
        _encoder.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WrongAnswer(f"set metadata that a journal or a file can't hold: {error}") from error
    return value


def _checked_loss_mask(before: list[int], now: object) -> list[int]:
    if not isinstance(now, list):
        raise WrongAnswer(f"set loss_mask to {described(now)}, expected a list")
    if len(now) != len(before):
        raise WrongAnswer(f"set a loss_mask of length {len(now)} for {len(before)} output tokens")
    if now == before:
        return before
    if not set(now) <= {0, 1}:
        wrong = next(position for position, value in enumerate(now) if value not in (0, 1))
        raise WrongAnswer(f"set loss_mask[{wrong}] to {shown(now[wrong])}, expected 0 or 1")
    if not all(map(operator.le, now, before)):
        unmasked = next(position for position, (new, old) in enumerate(zip(now, before, strict=True)) if new > old)
        raise WrongAnswer(f"unmasked token {unmasked}: a hook may turn a 1 of loss_mask into a 0, never the reverse")
    return list(map(int, now))


def checked_verdict(before: Group, answer: object) -> Verdict:
    """What `on_group` says of `before`.

    Raises:
        WrongAnswer: it is neither `Accept` nor `Reject`, or accepts another group than it was given.

    """
    if isinstance(answer, Reject):
        return Verdict(group=before, rejected=answer.reason)
    if not isinstance(answer, Accept):
        raise WrongAnswer(f"returned {described(answer)}, expected Accept() or Reject(reason)")
    if answer.group is None:
        return Verdict(group=before)
    return Verdict(group=_checked_group(before, answer.group))


def _checked_group(before: Group, now: object) -> Group:
    if not isinstance(now, Group):
        raise WrongAnswer(f"accepted {described(now)}, expected a Group")
    if (now.group_id, now.complete) != (before.group_id, before.complete):
        raise WrongAnswer(f"changed group_id or complete of group {before.group_id}")
    ids, ids_before = ([one.trajectory_id for one in group.trajectories] for group in (now, before))
    if ids != ids_before:
        raise WrongAnswer(f"changed the trajectories from {shown(ids_before)} to {shown(ids)}")
    pairs = zip(before.trajectories, now.trajectories, strict=True)
    trajectories = [checked_trajectory(was, is_now) for was, is_now in pairs]
    return msgspec.structs.replace(before, trajectories=trajectories, metadata=_checked_metadata(now.metadata))


def checked_decision(answer: object) -> Decision:
    """What `on_boundary` says.

    Raises:
        WrongAnswer: it is no decision.

    """
    if not isinstance(answer, Decision):
        raise WrongAnswer(f"returned {described(answer)}, expected Continue(), Stop(), Fork(k) or Append(token_ids)")
    return answer


def checked_nothing(answer: object) -> None:
    """What `on_weights` answers.

    Raises:
        WrongAnswer: it is not `None`.

    """
    if answer is not None:
        raise WrongAnswer(f"returned {described(answer)}, expected None")
