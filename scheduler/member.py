"""One live member of a round: when it ran, what it cost, and which KV its tokens were sampled from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longtail.scheduler.boundaries import BoundarySpec
from longtail.scheduler.kv_policy import FRESH, KvPolicy, KvVersions
from longtail.scheduler.metadata import MemberReport, RolloutMetadata
from longtail.scheduler.tree_place import BirthReport

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from longtail.scheduler.forking import History


@dataclass(slots=True)
class Member:
    """What a member's final report will say.

    An episode is the time between two losses of its KV. `start` is where the current one began (tokens whose KV was
    there), `None` while it is not in the batch; `frontier` is the longest prefix that ever had KV. `num_renewals`
    counts how often new weights took its KV. `history` is there if it may be forked. `stop` are stop strings that the
    front end does not look for; `stops_at_boxed` is whether a boxed answer ends it. `birth` is how it left another path
    of its tree.
    """

    request: Request
    opened_ts: float
    arrived_ts: float
    park: str | None = None
    kv_policy: KvPolicy = FRESH
    num_prior: int = 0
    frontier: int = 0
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    start: int | None = None
    num_scheduled: int = 0
    num_recomputed: int = 0
    num_cached: int = 0
    num_parked: int = 0
    num_renewals: int = 0
    kv: KvVersions | None = None
    history: History | None = None
    boundary: BoundarySpec | None = None
    stop: tuple[str, ...] = ()
    stops_at_boxed: bool = False
    is_unborn: bool = False
    birth: BirthReport | None = None
    segments: list[tuple[int, list[tuple[str, int, int]]]] = field(default_factory=list)

    @staticmethod
    def of(request: Request, metadata: RolloutMetadata, opened_ts: float, arrived_ts: float) -> Member:
        """A member that has just arrived."""
        return Member(
            request,
            opened_ts,
            arrived_ts,
            park=metadata.park,
            kv_policy=KvPolicy.parse(metadata.kv_policy),
            num_prior=metadata.num_prior_tokens,
            frontier=metadata.num_computed_tokens,
            boundary=metadata.boundary,
            stop=metadata.stop,
            stops_at_boxed=metadata.stop_at_boxed,
            is_unborn=metadata.tree is not None and not metadata.tree.has_begun,
        )

    def begin(self, birth: BirthReport | None) -> None:
        """A path of a tree begins, with the output tokens that its request has of another one."""
        self.is_unborn, self.birth = False, birth
        self.num_prior = self.request.num_output_tokens
        if self.num_prior:
            self.frontier = self.request.num_tokens - 1

    @property
    def num_new_tokens(self) -> int:
        """Output tokens since it arrived."""
        return self.request.num_output_tokens - self.num_prior

    @property
    def num_valid(self) -> int:
        """Positions whose KV is certainly valid: asynchronous scheduling runs ahead of its tokens."""
        ahead = self.request.num_computed_tokens - self.request.num_output_placeholders
        return max(0, min(ahead, self.request.num_tokens - 1))

    def enter_batch(self, start: int, kv: KvVersions | None, version: int, now: float, *, was_parked: bool) -> None:
        """It joins the batch with KV for `[0, start)`, parked or from the prefix cache; `None` is of `version`."""
        if was_parked:
            self.num_parked = start
        elif self.scheduled_ts is None:
            self.num_cached = start
        if self.scheduled_ts is None:
            self.scheduled_ts = now
        self.start = start
        if kv is None:
            kv = KvVersions([])
        kv.extend(start, version)
        # KV that was lost and computed again under the same weights is the same KV.
        if self.kv is None or self.kv.runs != kv.runs:
            self.kv = kv
            self._begin_segment()

    def change_weights(self, version: int) -> None:
        """It runs on, with its KV as it is."""
        assert self.kv is not None
        self.kv.extend(self.request.num_computed_tokens, version)
        self._begin_segment()

    def end_episode(self) -> None:
        """It leaves the batch, or loses its KV."""
        if self.start is None:
            return
        computed = self.request.num_computed_tokens
        self.num_scheduled += computed - self.start
        self.num_recomputed += max(0, min(computed, self.frontier) - self.start)
        self.frontier = max(self.frontier, computed)
        self.start = None

    def report(self, now: float) -> MemberReport:
        """Its final report."""
        self.end_episode()
        num_output = self.request.num_output_tokens
        return MemberReport(
            opened_ts=self.opened_ts,
            arrived_ts=self.arrived_ts,
            finished_ts=now,
            scheduled_ts=self.scheduled_ts,
            first_token_ts=self.first_token_ts,
            num_scheduled_tokens=self.num_scheduled,
            num_recomputed_tokens=self.num_recomputed,
            num_cached_tokens=self.num_cached,
            num_preemptions=self.request.num_preemptions - self.num_renewals,
            num_parked_tokens=self.num_parked,
            num_computed_tokens=min(self.frontier, self.request.num_tokens - 1),
            segments=[segment for segment in self.segments if segment[0] < num_output],
            is_unborn=self.is_unborn,
            birth=self.birth,
        )

    def _begin_segment(self) -> None:
        """The next token begins a segment, in place of one that got none."""
        assert self.kv is not None
        start = self.request.num_output_tokens
        if self.segments and self.segments[-1][0] == start:
            self.segments.pop()
        self.segments.append((start, self.kv.spans(self.request.num_tokens)))
