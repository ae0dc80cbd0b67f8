"""Groups in which every token is once: what is kept in a journal, and sent to a trainer.

A branch leaves out the tokens that it has of the trajectory that it left, with their log-probs, masks, versions and
segments, which belong to that one. Taking them in again gives exactly what there was: a branch of which that is not
true, because a hook has changed it, stays whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from longtail.engine.trajectory import Group, GroupFields, Trajectory, TrajectoryFields
from longtail.engine.trajectory_parts import merged, upto

_ARRAYS = ("output_token_ids", "logprobs", "source_mask", "loss_mask")


class PackedTrajectory(TrajectoryFields, frozen=True, kw_only=True):
    """A trajectory without its first `num_shared` output tokens, which are those of member `branch.of` of its group.

    The arrays begin after them; spans and segments too, their positions counted in the whole trajectory.
    """

    num_shared: int = 0


class PackedGroup(GroupFields, frozen=True, kw_only=True):
    """A group of packed trajectories."""

    trajectories: list[PackedTrajectory]


def pack(trajectory: Trajectory, members: Mapping[int, Trajectory | None]) -> PackedTrajectory:
    """One member of a group; `members` are the others, as far as they are known, by index."""
    fields = _fields_of(trajectory)
    branch = trajectory.branch
    if branch is None or not branch.at or members.get(branch.of) is None:
        return PackedTrajectory(**fields)
    at = branch.at
    packed = PackedTrajectory(
        **fields
        | {name: fields[name][at:] for name in _ARRAYS}
        | {
            name: [replace(span, start=max(span.start, at)) for span in fields[name] if span.end > at]
            for name in ("weight_versions", "segments")
        },
        num_shared=at,
    )
    try:
        is_exact = unpack(packed, members) == trajectory
    except ValueError:
        is_exact = False
    return packed if is_exact else PackedTrajectory(**fields)


def unpack(packed: PackedTrajectory, members: Mapping[int, Trajectory | None]) -> Trajectory:
    """The trajectory; `members` has the one that it left.

    Raises:
        ValueError: that is not there, or has not so many tokens, or what comes of it is no trajectory.

    """
    fields = _fields_of(packed)
    if not (at := packed.num_shared):
        return Trajectory(**fields)
    parent = None if packed.branch is None else members.get(packed.branch.of)
    if parent is None or not 0 < at <= len(parent.output_token_ids):
        raise ValueError(f"trajectory {packed.trajectory_id}: nothing has its first {at} tokens")
    fields |= {name: getattr(parent, name)[:at] + fields[name] for name in _ARRAYS}
    fields["weight_versions"] = merged([*upto(parent.weight_versions, at), *packed.weight_versions])
    fields["segments"] = [*upto(parent.segments, at), *packed.segments]
    return Trajectory(**fields)


def pack_members(members: Sequence[Trajectory | None]) -> list[PackedTrajectory | None]:
    """The members of a group. All stay whole if a hook has given two of them one index."""
    there = [one for one in members if one is not None]
    by_index = {one.index: one for one in there}
    known = by_index if len(by_index) == len(there) else {}
    return [None if one is None else pack(one, known) for one in members]


def unpack_members(packed: Sequence[PackedTrajectory | None]) -> list[Trajectory | None]:
    """The members again, whatever their order.

    Raises:
        ValueError: see `unpack`.

    """
    indices = {one.index for one in packed if one is not None}
    whole: list[Trajectory | None] = [None] * len(packed)
    children: defaultdict[int, list[tuple[int, PackedTrajectory]]] = defaultdict(list)
    ready: list[tuple[int, PackedTrajectory]] = []
    for place, one in enumerate(packed):
        if one is None:
            continue
        parent = one.branch.of if one.num_shared and one.branch is not None else None
        if parent is None or parent not in indices:
            ready.append((place, one))
        else:
            children[parent].append((place, one))
    done: dict[int, Trajectory | None] = {}
    while ready:
        place, one = ready.pop()
        whole[place] = done[one.index] = unpack(one, done)
        ready += children.pop(one.index, ())
    for (_, one), *_ in children.values():
        unpack(one, {})  # They wait for each other: it raises.
    return whole


def pack_group(group: Group) -> PackedGroup:
    """A whole group."""
    members = [one for one in pack_members(group.trajectories) if one is not None]
    return PackedGroup(**_fields_of(group) | {"trajectories": members})


def unpack_group(packed: PackedGroup) -> Group:
    """The group again.

    Raises:
        ValueError: see `unpack`.

    """
    members = [one for one in unpack_members(packed.trajectories) if one is not None]
    return Group(**_fields_of(packed) | {"trajectories": members})


def _fields_of(value: TrajectoryFields | GroupFields) -> dict[str, Any]:
    fields = msgspec.structs.asdict(value)
    fields.pop("num_shared", None)
    return fields
