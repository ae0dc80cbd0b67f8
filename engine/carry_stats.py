"""The numbers of a round that carries over: staleness of its tokens, and the length bias of what it returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from longtail.engine.group_state import token_spans
from longtail.engine.trajectory import CarryStats, Group, Round, RoundStats, Trajectory
from longtail.scheduler.staleness import StalenessBound, histogram

if TYPE_CHECKING:
    from longtail.engine.group_store import GroupStore


def masked(trajectory: Trajectory, bound: StalenessBound, version: int) -> Trajectory:
    """The trajectory with loss mask 0 for every token that is beyond the bound under weights of `version`."""
    mask = bound.mask(trajectory.loss_mask, token_spans(trajectory), version)
    return msgspec.structs.replace(trajectory, loss_mask=mask)


def masked_group(group: Group, bound: StalenessBound, version: int) -> Group:
    """The group with `masked` trajectories."""
    return msgspec.structs.replace(group, trajectories=[masked(t, bound, version) for t in group.trajectories])


def masked_round(round_: Round, bound: StalenessBound, version: int) -> Round:
    """A round of an earlier process, masked for the weights of today whatever the bound's action was then."""
    return msgspec.structs.replace(round_, groups=[masked_group(group, bound, version) for group in round_.groups])


@dataclass(slots=True)
class Tally:
    """What happened in a round; the fields are those of `CarryStats` and `RoundStats`."""

    carried_in: int
    banked_in: int
    fresh: int = 0
    resumes: int = 0
    parked_tokens: int = 0
    reprefilled_tokens: int = 0
    output_tokens: int = 0
    scheduled_tokens: int = 0
    preemptions: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    restarts: int = 0

    def add(self, segment: Trajectory) -> None:
        """A request of the round ended, with these tokens."""
        self.parked_tokens += segment.tokens.parked
        self.reprefilled_tokens += segment.tokens.recomputed
        self.scheduled_tokens += segment.tokens.scheduled
        self.preemptions += segment.tokens.preemptions
        self.output_tokens += len(segment.output_token_ids)

    def stats(
        self, store: GroupStore, returned: Sequence[Group], bound: StalenessBound, version: int, *, num_judging: int
    ) -> CarryStats:
        """The numbers of the round when it returns these groups, which are still banked."""
        trajectories = [t for group in returned for t in group.trajectories]
        staleness = staleness_of(trajectories, version)
        every = [member for group in store.groups() for member in group.members]
        mean_accepted, mean_all = mean_lengths(trajectories, every)
        return CarryStats(
            version=version,
            num_carried_in=self.carried_in,
            num_banked_in=self.banked_in,
            num_fresh=self.fresh,
            num_accepted=len(returned),
            num_filtered=self.reasons.total(),
            num_banked=len(store.banked) - len(returned),
            num_carried=len(store.carried),
            num_judging=num_judging,
            num_restarts=self.restarts,
            num_resumes=self.resumes,
            num_parked_tokens=self.parked_tokens,
            num_reprefilled_tokens=self.reprefilled_tokens,
            filtered_reasons=dict(self.reasons),
            staleness=dict(sorted(staleness.items())),
            num_masked_tokens=bound.num_masked(staleness),
            off_policy_share=off_policy_share(staleness),
            mean_accepted_tokens=mean_accepted,
            mean_all_tokens=mean_all,
            length_bias=mean_accepted / mean_all if mean_accepted is not None and mean_all else None,
        )


class RoundTokens(Protocol):
    """Tokens of a round: sampled, and put through the model."""

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def num_scheduled_tokens(self) -> int: ...


def staleness_of(trajectories: Iterable[Trajectory], version: int) -> Counter[int]:
    """Tokens by staleness under weights of `version`."""
    counts: Counter[int] = Counter()
    for trajectory in trajectories:
        counts.update(histogram(token_spans(trajectory), version))
    return counts


def off_policy_share(staleness: Counter[int]) -> float:
    """Share of the tokens that are older than the weights; 0 without tokens."""
    total = staleness.total()
    return 1 - staleness[0] / total if total else 0.0


def mean_length(lengths: Sequence[int], is_finished: Sequence[bool]) -> float | None:
    """Estimated mean length when some trajectories are unfinished, so that only a lower bound of theirs is known.

    The area under the estimate of Kaplan and Meier ("Nonparametric estimation from incomplete observations", 1958),
    up to the longest length seen. Averaging the lengths as they are would call every unfinished trajectory a short
    one. `None` when nothing finished.
    """
    if not any(is_finished):
        return None
    num_at_risk = len(lengths)
    alive, area, last = 1.0, 0.0, 0
    ended: Counter[int] = Counter()
    left: Counter[int] = Counter()
    for length, finished in zip(lengths, is_finished, strict=True):
        (ended if finished else left)[length] += 1
    for length in sorted(ended.keys() | left.keys()):
        area += alive * (length - last)
        last = length
        if num_at_risk:
            alive *= 1 - ended[length] / num_at_risk
        num_at_risk -= ended[length] + left[length]
    return area


def mean_lengths(
    returned: Sequence[Trajectory], every: Sequence[Trajectory | None]
) -> tuple[float | None, float | None]:
    """Mean length of the returned trajectories, and the estimated mean of all; members that never ran are `None`."""
    of_returned = fmean(len(t.output_token_ids) for t in returned) if returned else None
    lengths = [0 if t is None else len(t.output_token_ids) for t in every]
    return of_returned, mean_length(lengths, [t is not None and t.ended_by_itself for t in every])


def round_stats(
    carry: CarryStats, groups: Sequence[Group], waves: Sequence[Mapping[str, Any]], tokens: RoundTokens, seconds: float
) -> RoundStats:
    """The common numbers of a round; `waves` are the scheduler's of each of its waves."""
    return RoundStats(
        num_submitted_groups=carry.num_carried_in + carry.num_banked_in + carry.num_fresh,
        num_complete_groups=carry.num_accepted + carry.num_banked,
        num_cut_groups=carry.num_carried,
        num_failed_groups=carry.num_filtered,
        num_cut_members=sum(wave["num_cut_members"] for wave in waves),
        num_output_tokens=tokens.num_output_tokens,
        num_kept_tokens=sum(t.num_own_tokens for group in groups for t in group.trajectories),
        num_scheduled_tokens=tokens.num_scheduled_tokens,
        num_recomputed_tokens=carry.num_reprefilled_tokens,
        num_steps=sum(wave["num_steps"] for wave in waves),
        idle_slot_steps=sum(wave["idle_slot_steps"] for wave in waves),
        peak_running=max((wave["peak_running"] for wave in waves), default=0),
        seconds=seconds,
    )
