"""The token-exact records that a rollout produces: trajectory, group, round.

Everything is a frozen msgspec struct, so one definition serves the library, the JSONL files, the HTTP
routes and the wire. A trajectory is token ids; `text` is a convenience and never an input again. Arrays of
one trajectory have one length by construction: `Trajectory` refuses to exist otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from longtail.scheduler.boundaries import BOUNDARY_STOP_REASON
from longtail.scheduler.metadata import CUT_STOP_REASON
from longtail.scheduler.tree_place import DISMISSED_STOP_REASON

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]

#: In a source mask; 0 is a token that the environment appended.
MODEL_TOKEN = 1


class VersionSpan(msgspec.Struct, frozen=True):
    """Output tokens `[start, end)` were sampled under weight `version`, a decimal number (vLLM's `weight_versions`)."""

    version: str
    start: int
    end: int


class KvSpan(msgspec.Struct, frozen=True):
    """Positions `[start, end)` of prompt and output have KV that was computed under weight `version`."""

    version: str
    start: int
    end: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens `[start, end)`, sampled in one go: between a start, a resume, a weight change or a lost KV.

    Attributes:
        kv_versions: spans over the positions whose KV was there when its first token was sampled; the KV of the
            segment's own tokens has the version that the tokens have. One span with the token's version is what
            a trainer recomputes; anything else is KV of older weights (policy `stale`, or a shared prefix): no
            recomputation gives `logprobs` again, but they are what the tokens were sampled with, so that a ratio to
            them is right.

    """

    start: int
    end: int
    kv_versions: list[KvSpan]


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds since the round was submitted; `None` for a stage that was never reached.

    Of a trajectory that was carried over, those of its last part, in the round that this ran in.
    `first_token_s` and `finished_s` are when the engine core had the token, not when the front end saw it.
    """

    submitted_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What one trajectory cost, in tokens.

    Attributes:
        scheduled: tokens that went through the model, prompt and output.
        recomputed: of those, tokens whose KV had been computed before and was lost (preemption, a resume without it).
        cached: prompt tokens that the prefix cache served instead.
        parked: tokens whose parked KV was taken up again instead.
        preemptions: how often the pool took the KV of the running request.

    """

    scheduled: int = 0
    recomputed: int = 0
    cached: int = 0
    parked: int = 0
    preemptions: int = 0


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """Where a trajectory left another one.

    Attributes:
        of: index of the other one in the same group.
        at: output tokens `[0, at)` are that one's, log-probs and versions too; whatever they cost is counted there.
        reason: a caller or a hook forked it (`fork`), or it is a path of a tree and began at a boundary of the other
            (`boundary`), or inside of one that had ended (`fallback`).
        probability: of that decision of the tree's, given all before; `None` for a fork. See
            `longtail.scheduler.tree_policy.Birth`.

    """

    of: int
    at: int
    reason: Literal["fork", "boundary", "fallback"] = "fork"
    probability: float | None = None


class Boundary(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a segment at which something was decided.

    Attributes:
        start: output tokens `[start, end)` are the segment.
        end: see `start`.
        made_by: the string or the token id that ended it; `None` if it had its length.
        num_appended: tokens that the environment appended there.

    """

    start: int
    end: int
    made_by: str | int | None = None
    num_appended: int = 0


class TrajectoryFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `Trajectory`, unchecked."""

    trajectory_id: str
    round_id: str
    group_id: str
    index: int
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    logprobs: list[float]
    source_mask: list[int]
    loss_mask: list[int] = []
    weight_versions: list[VersionSpan]
    segments: list[Segment] = []
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    text: str | None = None
    seed: int | None = None
    branch: Branch | None = None
    boundaries: list[Boundary] = []
    reward: float | None = None
    timings: Timings
    tokens: TokenCounts
    metadata: dict[str, Any] = {}


class Trajectory(TrajectoryFields, frozen=True, kw_only=True):
    """One sample, prompt to end, token by token.

    Attributes:
        trajectory_id: unique in its engine: `<round>/<group>/<index>`, or of one that may be carried over
            `<round that its group began in>/<serial of the group>.<restarts>/<index>`.
        round_id: the round that it was returned in; until then, of one that is carried over, the scheduler's round that
            it last ran in.
        group_id: the group (one prompt) that it belongs to.
        index: its place in the group, 0-based.
        prompt_token_ids: int token ids, length P.
        output_token_ids: int token ids, length T (0 when it was cut before its first step).
        logprobs: float, length T: log-probability of each output token under the distribution that it was
            sampled from, after temperature and top-p/top-k (the behaviour policy of a PPO ratio). 0.0, which means
            nothing, for a token that the environment appended.
        source_mask: int, length T: 1 for a token that the model sampled, 0 for one that the environment
            appended.
        loss_mask: int, length T: 0 for a token that must not be trained on, because the environment appended it or
            because it is staler than the bound; by default `source_mask`.
        weight_versions: half-open spans over the output that cover all T tokens.
        segments: cover all T tokens; empty where nobody kept record.
        finish_reason: vLLM's word for why it ended; `abort` for a member of a cut round.
        stop_reason: the stop string or token id that ended it, or `rollout_cut`.
        text: the detokenized output, for people.
        seed: the sampling seed, if one was given.
        branch: where it left another trajectory; `None` for one that began with the prompt.
        boundaries: of its segments so far, in order.
        reward: what a reward hook gave it.
        timings: see `Timings`.
        tokens: see `TokenCounts`.
        metadata: what the caller attached to the prompt, unchanged.

    Raises:
        ValueError: the arrays do not have one length, or the versions do not cover the output.

    """

    def __post_init__(self) -> None:
        num_tokens = len(self.output_token_ids)
        if not self.loss_mask:
            msgspec.structs.force_setattr(self, "loss_mask", self.source_mask)
        for name in ("logprobs", "source_mask", "loss_mask"):
            if (length := len(getattr(self, name))) != num_tokens:
                raise ValueError(
                    f"trajectory {self.trajectory_id}: {name} has length {length}, output_token_ids has {num_tokens}"
                )
        if self.branch is not None and not 0 <= self.branch.at <= num_tokens:
            raise ValueError(f"trajectory {self.trajectory_id}: {self.branch} is not within its {num_tokens} tokens")
        for name in ("weight_versions", "segments"):
            spans: list[VersionSpan | Segment] = getattr(self, name)
            if not _cover(spans, num_tokens) and (spans or name == "weight_versions"):
                raise ValueError(
                    f"trajectory {self.trajectory_id}: {name} {spans} do not cover its {num_tokens} output tokens"
                )

    @property
    def ended_by_itself(self) -> bool:
        """Nobody stopped it: it counts towards a complete group."""
        return self.finish_reason in ("stop", "length", "repetition")

    @property
    def is_paused(self) -> bool:
        """It is at a boundary, where nothing has been decided yet."""
        return self.finish_reason == "abort" and self.stop_reason == BOUNDARY_STOP_REASON

    @property
    def segment_start(self) -> int:
        """Output tokens before the segment that it is in."""
        return self.boundaries[-1].end + self.boundaries[-1].num_appended if self.boundaries else 0

    @property
    def was_dismissed(self) -> bool:
        """It is a member of a tree that had no branch for it, and never began."""
        return self.finish_reason == "abort" and self.stop_reason == DISMISSED_STOP_REASON

    @property
    def num_own_tokens(self) -> int:
        """Output tokens that are not another trajectory's."""
        return len(self.output_token_ids) - (0 if self.branch is None else self.branch.at)

    @property
    def was_cut(self) -> bool:
        """The scheduler stopped it because its round had its target."""
        return self.finish_reason == "abort" and self.stop_reason == CUT_STOP_REASON


def _cover(spans: list[VersionSpan | Segment], num_tokens: int) -> bool:
    """Whether non-empty spans follow each other from 0 to `num_tokens`."""
    covered = 0
    for span in spans:
        if span.start != covered or span.end <= span.start:
            return False
        covered = span.end
    return covered == num_tokens


class GroupFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `Group`, but for its trajectories."""

    group_id: str
    complete: bool
    num_dismissed: int = 0
    metadata: dict[str, Any] = {}
    rejected: str | None = None


class Group(GroupFields, frozen=True, kw_only=True):
    """The samples of one prompt, ordered by `index`.

    `complete` is true when every member finished by itself (`stop`, `length` or `repetition`). `rejected` says why a
    group was filtered. `num_dismissed` members of a tree never began: it had no branch for them.
    """

    trajectories: list[Trajectory]


class RoundStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one round cost. Counts are exact; `seconds` is wall time, submit to last final output.

    Attributes:
        num_submitted_groups: always `num_complete_groups + num_cut_groups + num_failed_groups`.
        num_cut_groups: groups with at least one member that the scheduler stopped; carried groups.
        num_failed_groups: groups with a member that ended as `error` or by the caller's abort, and none cut; filtered
            groups.
        num_cut_members: trajectories stopped by the cut, never-scheduled ones included.
        num_output_tokens: output tokens of all members; `num_kept_tokens` those of complete groups.
        num_steps: engine steps while the round was open; `idle_slot_steps` sums, over those steps, the batch
            slots that had been in use at the round's peak (`peak_running`) and were empty then.

    """

    num_submitted_groups: int
    num_complete_groups: int
    num_cut_groups: int
    num_failed_groups: int
    num_cut_members: int
    num_output_tokens: int
    num_kept_tokens: int
    num_scheduled_tokens: int
    num_recomputed_tokens: int
    num_steps: int
    idle_slot_steps: int
    peak_running: int
    seconds: float


class CarryStats(msgspec.Struct, frozen=True, kw_only=True):
    """What carrying groups over did to one round.

    Every group of the round is accounted for: `num_carried_in + num_banked_in + num_fresh` is
    `num_accepted + num_filtered + num_banked + num_carried`.

    Attributes:
        version: weight version when the round was returned.
        num_carried_in: unfinished groups of earlier rounds, whether the round ran them or not; `num_banked_in`
            complete ones; `num_fresh` groups begun in this round.
        num_accepted: groups returned. `num_filtered` groups were refused, why is in `filtered_reasons`.
        num_banked: complete groups kept for the next round. `num_carried` groups go on in it; `num_judging` of them
            are complete and wait for a hook.
        num_restarts: groups that began again from their prompt because of the staleness bound.
        num_resumes: trajectories that went on from a cut; they took up the parked KV of `num_parked_tokens` tokens.
        num_reprefilled_tokens: tokens that had KV once and were computed again.
        staleness: tokens of the returned groups by staleness, in versions.
        num_masked_tokens: of those, tokens beyond the bound, whose loss mask is 0.
        off_policy_share: share of those tokens with a staleness above 0.
        mean_accepted_tokens: mean length of the returned trajectories.
        mean_all_tokens: estimated mean length of all trajectories of the round, counting unfinished ones as longer
            than they are (Kaplan and Meier 1958, up to the longest length seen); `None` without a finished one.
        length_bias: the first over the second: below 1, the round returned shorter trajectories than the model makes.

    """

    version: int
    num_carried_in: int
    num_banked_in: int
    num_fresh: int
    num_accepted: int
    num_filtered: int
    num_banked: int
    num_carried: int
    num_judging: int
    num_restarts: int
    num_resumes: int
    num_parked_tokens: int
    num_reprefilled_tokens: int
    filtered_reasons: dict[str, int]
    staleness: dict[int, int]
    num_masked_tokens: int
    off_policy_share: float
    mean_accepted_tokens: float | None
    mean_all_tokens: float | None
    length_bias: float | None


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One collection of groups for one training step.

    A round that carries over has its accepted groups in `groups`, those that were refused in `filtered_groups`, and
    what that did to it in `carry`.
    """

    round_id: str
    target_groups: int
    groups: list[Group]
    stats: RoundStats
    filtered_groups: list[Group] = []
    carry: CarryStats | None = None

    @property
    def complete_groups(self) -> list[Group]:
        """The groups that a trainer takes; at least `target_groups` unless too few could complete."""
        return [group for group in self.groups if group.complete]

    @property
    def trajectories(self) -> list[Trajectory]:
        """Every trajectory of the round, by group and index."""
        return [trajectory for group in self.groups for trajectory in group.trajectories]
