"""Trajectories put together from what was sampled in several requests, and cut where a branch leaves them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from longtail.engine.config import MAX_SEED
from longtail.engine.trajectory import (
    Boundary,
    Branch,
    FinishReason,
    KvSpan,
    Segment,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)
from longtail.scheduler.boundaries import BOUNDARY_STOP_REASON
from longtail.scheduler.metadata import CUT_STOP_REASON

Span = TypeVar("Span", VersionSpan, Segment)


def joined(prior: Trajectory, last: Trajectory) -> Trajectory:
    """`prior` with the segments of `last`, which went on from its tokens.

    The end is that of `last`, and so are its times; token counts add up.
    """
    offset = len(prior.output_token_ids)
    moved = [VersionSpan(span.version, span.start + offset, span.end + offset) for span in last.weight_versions]
    segments = [Segment(start=s.start + offset, end=s.end + offset, kv_versions=s.kv_versions) for s in last.segments]
    counts = {name: getattr(prior.tokens, name) + getattr(last.tokens, name) for name in TokenCounts.__struct_fields__}
    return msgspec.structs.replace(
        last,
        output_token_ids=prior.output_token_ids + last.output_token_ids,
        logprobs=prior.logprobs + last.logprobs,
        source_mask=prior.source_mask + last.source_mask,
        loss_mask=prior.loss_mask + last.loss_mask,
        weight_versions=merged([*prior.weight_versions, *moved]),
        segments=[*prior.segments, *segments],
        branch=prior.branch,
        boundaries=prior.boundaries,
        tokens=TokenCounts(**counts),
    )


def branches(parent: Trajectory, at: int, ids: dict[int, str], seeds: Sequence[int | None]) -> list[Trajectory]:
    """Branches that leave `parent` after `at` output tokens, by index and id; each is like one that was cut there."""
    prefix = msgspec.structs.replace(
        parent,
        output_token_ids=parent.output_token_ids[:at],
        logprobs=parent.logprobs[:at],
        source_mask=parent.source_mask[:at],
        loss_mask=[],
        weight_versions=upto(parent.weight_versions, at),
        segments=upto(parent.segments, at),
        finish_reason="abort",
        stop_reason=CUT_STOP_REASON,
        text=None,
        reward=None,
        timings=Timings(submitted_s=0.0),
        tokens=TokenCounts(),
        branch=Branch(of=parent.index, at=at),
        boundaries=[
            msgspec.structs.replace(one, num_appended=min(one.num_appended, at - one.end))
            for one in parent.boundaries
            if one.end <= at
        ],
    )
    return [
        msgspec.structs.replace(prefix, trajectory_id=trajectory_id, index=index, seed=seed)
        for (index, trajectory_id), seed in zip(ids.items(), seeds, strict=True)
    ]


def upto(spans: Sequence[Span], at: int) -> list[Span]:
    """Spans of output tokens, or what of them lies before `at`."""
    return [msgspec.structs.replace(span, end=min(span.end, at)) for span in spans if span.start < at]


def merged(spans: Sequence[VersionSpan]) -> list[VersionSpan]:
    """The same spans, neighbours of one version as one."""
    done: list[VersionSpan] = []
    for span in spans:
        start = done.pop().start if done and done[-1].version == span.version else span.start
        done.append(VersionSpan(span.version, start, span.end))
    return done


def num_computed_before(branch: Trajectory) -> int:
    """For how many positions there is, or was, KV where a branch begins: all but the last, if it has any token."""
    assert branch.branch is not None
    at = branch.branch.at
    return len(branch.prompt_token_ids) + at - 1 if at else 0


def paused_at(trajectory: Trajectory, made_by: str | int | None) -> Trajectory:
    """A trajectory that was stopped at a boundary, with that boundary."""
    end = len(trajectory.output_token_ids)
    boundary = Boundary(start=trajectory.segment_start, end=end, made_by=made_by)
    return msgspec.structs.replace(trajectory, boundaries=[*trajectory.boundaries, boundary])


def going_on(trajectory: Trajectory, version: int, appended: Sequence[int] = ()) -> Trajectory:
    """A paused trajectory that goes on like one that was cut, after tokens that the environment appended.

    These have the `version` of the weights of now.
    """
    cut = msgspec.structs.replace(trajectory, stop_reason=CUT_STOP_REASON)
    if not appended:
        return cut
    start, count = len(trajectory.output_token_ids), len(appended)
    zeros = [0] * count
    last = msgspec.structs.replace(trajectory.boundaries[-1], num_appended=count)
    return msgspec.structs.replace(
        cut,
        output_token_ids=[*trajectory.output_token_ids, *appended],
        logprobs=[*trajectory.logprobs, *(0.0 for _ in appended)],
        source_mask=trajectory.source_mask + zeros,
        loss_mask=trajectory.loss_mask + zeros,
        weight_versions=merged([*trajectory.weight_versions, VersionSpan(str(version), start, start + count)]),
        segments=[*trajectory.segments, Segment(start=start, end=start + count, kv_versions=[])],
        boundaries=[*trajectory.boundaries[:-1], last],
    )


def ended_at(trajectory: Trajectory, finish_reason: FinishReason) -> Trajectory:
    """A paused trajectory that ends where it is; a decision to stop is why if it is `stop`."""
    stop_reason = BOUNDARY_STOP_REASON if finish_reason == "stop" else None
    return msgspec.structs.replace(trajectory, finish_reason=finish_reason, stop_reason=stop_reason)


def branch_seed(seed: int | None, index: int) -> int | None:
    """The seed of the branch with this index, of a trajectory with that seed; `None` if that has none."""
    if seed is None:
        return None
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (MAX_SEED + 1)


def segments_of(
    starts_and_spans: Sequence[tuple[int, Sequence[tuple[str, int, int]]]], first: int, num_tokens: int
) -> list[Segment]:
    """Segments as the scheduler reports them, of the `num_tokens` tokens from `first` on, counted from there."""
    if not num_tokens:
        return []
    starts = [start - first for start, _ in starts_and_spans]
    ends = [*starts[1:], num_tokens]
    return [
        Segment(start=start, end=end, kv_versions=[KvSpan(*span) for span in spans])
        for start, end, (_, spans) in zip(starts, ends, starts_and_spans, strict=True)
        if end > start
    ]
