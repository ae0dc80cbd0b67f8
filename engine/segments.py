"""What one request of a trajectory has sampled, as a trajectory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longtail.engine.rounds import MemberPlan
from longtail.engine.trajectory import MODEL_TOKEN, Timings, TokenCounts, Trajectory, VersionSpan
from longtail.engine.trajectory_parts import joined, segments_of
from longtail.scheduler.fork_order import ForkPoint
from longtail.scheduler.metadata import MemberReport, report_of

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


def segment_of(member: MemberPlan, output: RequestOutput) -> Trajectory:
    """The final output of one request as a trajectory of its own, without what it had before."""
    completion: Any = output.outputs[0]
    token_ids, logprobs = list(completion.token_ids), completion.logprobs
    report, num_prior = report_of(output.kv_transfer_params), member.metadata.num_prior_tokens
    return Trajectory(
        trajectory_id=member.trajectory_id,
        round_id=member.metadata.round,
        group_id=member.prompt.group_id,
        index=member.index,
        prompt_token_ids=member.prompt.token_ids,
        output_token_ids=token_ids,
        # The sampled token's is the first of each position; there are more where a tree splits by entropy.
        logprobs=[] if logprobs is None else [logprobs.logprobs[start] for start in logprobs.start_indices],
        source_mask=[MODEL_TOKEN] * len(token_ids),
        weight_versions=[
            VersionSpan(span.version, span.start, span.end)
            for span in completion.weight_versions or ()
            if span.end > span.start
        ],
        segments=[] if report is None else segments_of(report.segments, num_prior, len(token_ids)),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        text=completion.text or None,
        seed=member.seed,
        timings=_timings(report),
        tokens=_token_counts(report),
        metadata=member.prompt.metadata,
    )


def trajectory_at(member: MemberPlan, point: ForkPoint) -> Trajectory:
    """What a trajectory that runs had when it was forked: what is known here, then what the scheduler says of it."""
    start = point.start
    sampled = Trajectory(
        trajectory_id=member.trajectory_id,
        round_id=member.metadata.round,
        group_id=member.prompt.group_id,
        index=member.index,
        prompt_token_ids=member.prompt.token_ids,
        output_token_ids=point.token_ids,
        logprobs=point.logprobs,
        source_mask=[MODEL_TOKEN] * len(point.token_ids),
        weight_versions=[VersionSpan(version, first - start, end - start) for version, first, end in point.versions],
        segments=segments_of(point.segments, start, len(point.token_ids)),
        finish_reason="abort",
        seed=member.seed,
        timings=Timings(submitted_s=0.0),
        tokens=TokenCounts(),
        metadata=member.prompt.metadata,
    )
    return sampled if member.prior is None else joined(member.prior, sampled)


def _timings(report: MemberReport | None) -> Timings:
    if report is None:
        return Timings(submitted_s=0.0)

    def since_opened(moment: float | None) -> float | None:
        return None if moment is None else moment - report.opened_ts

    return Timings(
        submitted_s=report.arrived_ts - report.opened_ts,
        scheduled_s=since_opened(report.scheduled_ts),
        first_token_s=since_opened(report.first_token_ts),
        finished_s=since_opened(report.finished_ts),
    )


def _token_counts(report: MemberReport | None) -> TokenCounts:
    if report is None:
        return TokenCounts()
    return TokenCounts(
        scheduled=report.num_scheduled_tokens,
        recomputed=report.num_recomputed_tokens,
        cached=report.num_cached_tokens,
        parked=report.num_parked_tokens,
        preemptions=report.num_preemptions,
    )
